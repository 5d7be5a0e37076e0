"""A real TensorBoard and a real Chromium, one each for all tests of this folder."""

import os
import shutil
import tempfile

import pytest

from tests.support.board import Board

from . import data
from .tab import Tab

A_HANG_MS = 300_000
LONGEST_FOLDER = 60  # a socket's path has 107 characters at most, and Chromium adds 43
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="session")
def _environment():
    """That of the browser, which puts a socket into its temporary folder."""
    if len(tempfile.gettempdir()) <= LONGEST_FOLDER:
        yield dict(os.environ)
        return
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="browser-") as folder:
        yield {**os.environ, "TMPDIR": folder}


@pytest.fixture(scope="session")
def browser(_environment):
    """A headless Chromium."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="NOT TESTED: the tab. pip install 'gradwatch[dev]'"
    )
    path = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if path is None:
        pytest.skip("NOT TESTED: the tab. Install Chromium (Debian: apt-get install chromium)")
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(
            executable_path=path,
            args=["--no-sandbox"] if root else [],
            env=_environment,
            timeout=A_HANG_MS,
        )
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def logdir(tmp_path_factory):
    """The runs of :mod:`data`."""
    folder = tmp_path_factory.mktemp("logs")
    data.write_all(folder)
    return folder


@pytest.fixture(scope="session")
def board(browser, logdir):
    """A TensorBoard that has seen all of them."""
    with Board(logdir) as running:
        running.wait(lambda: len(running.get_json("runs")["runs"]) == data.RUNS)
        yield running


@pytest.fixture
def new_tab(browser):
    """Makes tabs; none may have had a problem, or have asked another host."""
    tabs = []

    def make(base_url, width=1400, height=900, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(A_HANG_MS)
        tab = Tab(context.new_page(), base_url)
        tabs.append((context, tab))
        return tab

    yield make
    for context, tab in tabs:
        context.close()
        assert tab.problems == []
        assert tab.hosts == {tab.base_url.split("/")[2]}


@pytest.fixture
def tab(new_tab, board):
    """A tab of the board, not opened yet."""
    return new_tab(board.base_url)

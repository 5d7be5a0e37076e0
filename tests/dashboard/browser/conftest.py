"""A real TensorBoard and a real Chromium, one each for all tests of this folder."""

import os
import shutil

import pytest

from ..board import Board  # noqa: TID252
from . import data
from .tab import Tab

A_HANG_MS = 300_000
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="session")
def browser():
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
            executable_path=path, args=["--no-sandbox"] if root else []
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

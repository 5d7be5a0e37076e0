"""TensorBoard around the tab: its colours, its address, its filter, its reload."""

import base64
import json
import shutil

import numpy as np
import pytest

from tests.support.board import Board

from . import data
from .tab import READY

LIVE_STEPS = 400


def test_dark_mode_is_followed_and_the_canvases_are_drawn_anew(tab):
    """TensorBoard's switch turns the page and the letters on the canvases, and back."""
    tab.open(run="known/a")
    letters = """() => {
      const canvas = document.querySelector("canvas.axis");
      const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
      let [light, some] = [0, 0];
      for (let i = 0; i < data.length; i += 4) if (data[i + 3] > 200) { light += data[i]; some++; }
      return light / some;
    }"""
    before = tab.frame.evaluate(letters)
    tab.page.evaluate("document.body.classList.add('dark-mode')")
    tab.wait_for("document.body.classList.contains('dark-mode')")
    tab.ready()
    assert tab.frame.evaluate(letters) > before + 30
    page = tab.frame.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, page.removeprefix("rgb(").removesuffix(")").split(","))) < 80
    tab.page.evaluate("document.body.classList.remove('dark-mode')")
    tab.wait_for("!document.body.classList.contains('dark-mode')")
    tab.ready()
    assert tab.frame.evaluate(letters) == pytest.approx(before, abs=3)


def test_what_is_seen_is_in_the_address_and_comes_back_from_it(tab, new_tab):
    """A link that was copied shows the same run, steps, rows, filter, colours and curve."""
    tab.open(run="known/a")
    tab.frame.get_by_role("button", name="Relative").click()
    tab.frame.get_by_role("button", name="Modules", exact=True).click()
    tab.frame.locator(".filter").fill("attn")
    tab.ready()
    tab.drag(0.2, 0.4)
    seen, labels = tab.seen, tab.labels
    tab.page.wait_for_function("location.hash.includes('steps') && location.hash.includes('attn')")
    address = tab.page.evaluate("location.hash")
    assert address.startswith("#gradwatch&")
    again = new_tab(tab.base_url).open_at(address)
    assert again.seen == seen
    assert again.labels == labels
    assert again.frame.locator(".filter").input_value() == "attn"
    relative = again.frame.get_by_role("button", name="Relative")
    assert relative.get_attribute("aria-pressed") == "true"


def test_tensorboards_own_part_of_the_address_stays(tab):
    """What other tabs keep there is left alone, and other tabs open as before."""
    tab.open_at("#gradwatch&tagFilter=loss&p.other.key=1")
    tab.frame.get_by_role("button", name="Relative").click()
    tab.page.wait_for_function("location.hash.includes('colour=relative')")
    assert "tagFilter=loss" in tab.page.evaluate("location.hash")
    assert "p.other.key=1" in tab.page.evaluate("location.hash")


def test_a_damaged_link_is_no_problem(tab):
    """Parts that are no good are left out."""
    damage = "&p.gradwatch.steps=9-2&p.gradwatch.open=%7B&p.gradwatch.filter=(&%zz=%&p.gradwatch.step.run=gone"
    tab.page.goto(f"{tab.base_url}data/plugin_entry.html?name=gradwatch#gradwatch{damage}")
    tab.frame.wait_for_selector(READY)
    assert tab.frame.locator(".panel-title").text_content() == "known/a"
    assert tab.seen == (1, data.STEPS)


def selection(**runs):
    """The older dashboards' check boxes, as TensorBoard writes them into its address."""
    return base64.b64encode(json.dumps(runs).encode()).decode()


@pytest.mark.parametrize(
    "address",
    [
        "?runFilter=KNOWN%2F.#gradwatch",
        "#gradwatch&regexInput=known%2F.",
        f"#gradwatch&runSelectionState={selection(wide=False, two=False, **{data.HOSTILE_RUN: False})}",
    ],
    ids=["time_series", "regex", "check_boxes"],
)
def test_tensorboards_filter_of_runs_is_followed(tab, address):
    """Runs that are filtered out elsewhere leave the list; a button brings them back."""
    tab.open_at(address)
    names = tab.frame.locator(".run-name")
    assert names.all_text_contents() == ["known/a", "known/b"]
    tab.frame.get_by_role("button", name="Show them").click()
    assert names.count() == data.RUNS + 1


def test_a_run_that_grows_is_followed_at_its_end(tab, board, logdir):
    """After TensorBoard's reload a view of the newest steps has moved on; no picture went away."""
    folder = logdir / "live"
    rng = np.random.default_rng(0)
    norms = rng.uniform(0.1, 1, (LIVE_STEPS, 3)).astype("f4")
    try:
        with data.LogFile(folder) as log:
            log.add_layout("018000000002", "AdamW", ["a.weight", "a.bias", "b.weight"])
            data.append(log, norms[:300], session="018000000002")
            board.wait(lambda: last_step(board) == 300)
            tab.open(run="live", steps="201-300")
            assert tab.seen == (201, 300)
            tab.frame.evaluate(BLANKS)
            data.append(log, norms[300:], first=301, session="018000000002")
            board.wait(lambda: last_step(board) == LIVE_STEPS)
            tab.page.locator("app-header-reload button").click()
            tab.wait_for_text(".seen", "301\u2013400")
            tab.ready()
            assert tab.hover(0, 0.995)["step"] == "400"
            assert tab.frame.evaluate("window.blanks") == 0
    finally:
        shutil.rmtree(folder)
        board.wait(lambda: last_step(board) is None)


BLANKS = """() => {
  window.blanks = 0;
  const look = () => {
    const canvas = document.querySelector("canvas.heat");
    const at = canvas?.getContext("2d").getImageData(canvas.width - 3, 5, 1, 1).data;
    if (!at || at[3] === 0) window.blanks += 1;
    requestAnimationFrame(look);
  };
  look();
}"""


# The tab hears of a reload and, after a pause for others to come, acts on it.
COUNT_PAUSES = """() => {
  window.pauses = 0;
  const { setTimeout } = window;
  window.setTimeout = (task, ...more) => setTimeout(() => { task(); window.pauses += 1; }, ...more);
}"""


def last_step(board):
    """Of the run that grows; None while there is none."""
    runs = {run["run"]: run for run in board.get_json("runs")["runs"]}
    return runs["live"]["optimizers"][0]["last_step"] if "live" in runs else None


def test_it_works_below_a_path_prefix(new_tab, browser, logdir):
    """`--path_prefix` moves every address."""
    with Board(logdir, path_prefix="/foo/bar", load_fast="false") as board:
        assert board.base_url.endswith("/foo/bar/")
        tab = new_tab(board.base_url).open(run="known/a")
        assert tab.labels == data.NAMES
        loaded = "[...document.fonts].some((face) => face.status === 'loaded')"
        tab.wait_for(loaded)
        # TensorBoard's own page asks for its fonts without the prefix.
        tab.problems[:] = [text for text in tab.problems if "/font-roboto/" not in text]


def test_another_tab_and_back_leaves_the_picture(tab):
    """Behind another tab nothing is fetched, not even at a reload; back in front all is as it was."""
    tab.open(run="known/a", steps="11-60")
    pixels, asked = tab.row_pixels(0), []
    tab.frame.evaluate(COUNT_PAUSES)
    tab.page.on("request", lambda request: asked.append(request.url))
    tab.page.locator("[role=tab]", has_text="Scalars").first.click()
    iframe = "getComputedStyle(document.querySelector('iframe[src*=gradwatch]'))"
    tab.page.wait_for_function(f"{iframe}.visibility === 'hidden'")
    tab.page.locator("app-header-reload button").click()
    tab.frame.wait_for_function("window.pauses > 0", polling=50)
    assert [url for url in asked if "/plugin/gradwatch/" in url] == []
    with tab.page.expect_request("**/gradwatch/runs"):
        tab.page.locator("[role=tab]", has_text="Gradients").click()
    tab.ready()
    assert tab.seen == (11, 60)
    assert np.array_equal(tab.row_pixels(0), pixels)
    assert [url for url in asked if "/gradwatch/heatmap" in url] == []

"""What is drawn."""

import numpy as np
import pytest

from gradwatch.plots.heatmap import color_scale

from . import data
from .tab import bad_pixels

CLOSE = 14  # of 255: the tab's colours lie on 33 stops, and its quantiles on a sample


def cells_of(board, run, columns):
    """What the server says of a run, rows by columns."""
    found = board.heatmap(run, "AdamW", columns=columns)
    return found["norms"], found.get("bad", np.zeros_like(found["norms"]))


def test_tensorboard_shows_the_tab_and_the_newest_run(tab):
    """A person who has gradient data finds a tab named Gradients with the run written last."""
    tab.open()
    names = [text.strip() for text in tab.page.locator("[role=tab]").all_text_contents()]
    assert "Gradients" in names
    assert tab.frame.locator(".panel-title").text_content() == "known/a"
    assert tab.labels == data.NAMES


@pytest.mark.parametrize("relative", [False, True])
def test_every_good_cell_has_the_colour_of_gradwatchs_own_plots(tab, board, relative):
    """The pixels are the colours that gradwatch's own heat map gives to these numbers."""
    tab.open_alone(run="known/a", **({"colour": "relative"} if relative else {}))
    norms, bad = cells_of(board, "known/a", 4096)
    good = (norms > 0) & np.isfinite(norms) & (bad == 0)
    values = np.where(good, norms, np.nan).astype("f8")
    if relative:
        some = good.any(1)
        values[some] /= np.nanmedian(values[some], axis=1, keepdims=True)
    scale, colours = color_scale(np.nan_to_num(values), relative)
    for row in (0, 1, 5, 9, 17):
        seen = tab.row_pixels(row).astype(int)
        steps = np.arange(20, 300, 23)
        steps = steps[good[row, steps]]
        xs = ((steps + 0.5) / data.STEPS * len(seen)).astype(int)
        wanted = np.array(colours(scale(values[row, steps])))[:, :3] * 255
        assert np.abs(seen[xs] - wanted).max() <= CLOSE


def test_nan_and_inf_stand_where_they_were_written(tab):
    """A step with NaN is pink in its rows and in no other, at its place."""
    tab.open_alone(run="known/a")
    for row in range(len(data.NAMES)):
        pink = np.flatnonzero(bad_pixels(tab.row_pixels(row)))
        nan_rows = range(data.NAN_ROWS.start, data.NAN_ROWS.stop)
        step = data.NAN_STEP if row in nan_rows else data.INF_STEP if row == data.INF_ROW else None
        if step is None:
            assert len(pink) == 0
            continue
        middle = (step - 0.5) / data.STEPS * len(tab.row_pixels(row))
        assert len(pink) >= 3
        assert abs(pink.mean() + 0.5 - middle) <= 1.5


def test_exact_zeros_and_missing_gradients_have_colours_of_their_own(tab):
    """A row of exact zeros is black with lines; one without gradients has neither colour of the map."""
    tab.open_alone(run="known/a")
    zero = {tuple(map(int, colour)) for colour in tab.row_pixels(data.ZERO_ROW)}
    assert zero == {(0, 0, 0), (0x8D, 0x96, 0xA3)}
    absent = {tuple(map(int, colour)) for colour in tab.row_pixels(data.ABSENT_ROW)}
    assert absent == {(0xC3, 0xCA, 0xD4), (0xA3, 0xAC, 0xB9)}


@pytest.mark.parametrize("ratio", [1, 2])
def test_one_nan_of_6000_steps_is_three_pixels_in_rows_of_any_height(new_tab, board, ratio):
    """A single bad cell is at least 3 x 3 CSS pixels, also where 400 rows share the window."""
    tab = new_tab(board.base_url, device_scale_factor=ratio)
    tab.open_alone(run="wide", rows="parameters", fit="1")
    box = tab.box()
    width = len(tab.row_pixels(0))
    x = (data.WIDE_NAN - 0.5) / data.WIDE_STEPS * width
    pink = bad_pixels(tab.column_pixels(x))
    assert pink.sum() >= 3 * ratio
    middle = (data.WIDE_ROW + 0.5) / len(data.WIDE_NAMES) * box["height"] * ratio
    assert abs(np.flatnonzero(pink).mean() + 0.5 - middle) <= 2 * ratio
    across = [bad_pixels(tab.column_pixels(x + shift)).any() for shift in range(-6, 7)]
    assert sum(across) >= 3 * ratio


def test_the_legend_names_numbers_and_special_colours(tab):
    """The ends of the scale have numbers, marked where cells lie beyond; the special colours words."""
    tab.open_alone(run="known/a")
    assert "≤" in tab.frame.locator(".legend canvas").get_attribute("aria-label")
    text = tab.frame.locator(".legend").text_content()
    assert all(name in text for name in ("NaN or Inf", "exactly 0", "no gradient"))


def test_a_wider_window_is_drawn_with_finer_columns(new_tab, board):
    """After the window has grown, the server is asked for as many columns as there are pixels."""
    tab = new_tab(board.base_url, width=700).open_alone(run="wide")
    with tab.page.expect_request("**/heatmap?*") as request:
        tab.page.set_viewport_size({"width": 1400, "height": 900})
    tab.ready()
    columns = int(request.value.url.split("columns=")[1].split("&")[0])
    assert abs(columns - tab.box()["width"]) <= 20


def test_nothing_is_fetched_twice(tab):
    """Opening asks once for each answer; another look at the server only for the list of runs."""
    asked = []
    tab.page.on("request", lambda request: asked.append(request.url))
    tab.open(run="known/a")
    routes = ("runs", "layout", "heatmap", "events")
    counts = [
        sum(f"/gradwatch/{route}" in url for url in asked if ".js" not in url) for route in routes
    ]
    assert counts[1:] == [1, 1, 1]
    asked.clear()
    with tab.page.expect_request("**/gradwatch/runs"):
        tab.page.locator("app-header-reload button").click()
    tab.ready()
    assert not any(f"/gradwatch/{route}" in url for url in asked for route in routes[1:])

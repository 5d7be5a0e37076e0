"""Zoom, pan, and the exact numbers."""

import pytest

from . import data
from .test_rows import number


def test_the_tooltip_tells_the_exact_numbers_of_a_cell(tab):
    """Parameter, module, shape, step, norm, total norm and clip coefficient, as they were written."""
    tab.open_alone(run="known/a")
    found = tab.hover_step(3, 60, data.STEPS)
    norms = data.known()
    assert found["title"] == "h.0.mlp.down"
    assert (found["module"], found["shape"], found["step"]) == ("h.0.mlp", "8 \u00d7 4", "60")
    assert number(found["norm"]) == pytest.approx(norms[59, 3], rel=1e-4)
    total = float(sum(x * x for x in norms[59].astype("f8") if x > 0)) ** 0.5
    assert number(found["total norm"]) == pytest.approx(total, rel=1e-4)
    assert number(found["clip coefficient"]) == pytest.approx(min(1, 1 / total), rel=1e-3)
    assert number(found["clip threshold"]) == 1


def test_the_tooltip_tells_further_columns(tab):
    """A column that the writer added is told by its name, and left out where it is not known."""
    tab.open_alone(run="known/a")
    found = tab.hover_step(3, 61, data.STEPS)
    assert number(found["loss"]) == pytest.approx(data.losses(data.STEPS)[60, 0], rel=1e-3)
    assert "loss" not in tab.hover_step(3, 60, data.STEPS)


def test_the_tooltip_counts_bad_steps(tab):
    """A NaN is named, and Inf, exact zero and no gradient too."""
    tab.open_alone(run="known/a")
    assert tab.hover_step(4, data.NAN_STEP, data.STEPS)["norm"] == "NaN"
    assert tab.hover_step(4, data.NAN_STEP, data.STEPS)["bad steps"] == "1 with NaN or Inf"
    assert tab.hover_step(data.INF_ROW, data.INF_STEP, data.STEPS)["norm"] == "Inf"
    assert tab.hover_step(data.ZERO_ROW, 50, data.STEPS)["norm"] == "exactly 0"
    assert tab.hover_step(data.ABSENT_ROW, 50, data.STEPS)["norm"] == "no gradient"


def test_a_column_of_many_steps_names_them_all(tab):
    """Where a column has several steps, the tooltip gives their range and the largest norm."""
    tab.open_alone(run="wide", rows="parameters")
    found = tab.hover(5, 0.5)
    first, last = (int(part.replace(",", "")) for part in found["steps"].split("\u2013"))
    assert 1 <= last - first <= 20
    largest = data.wide()[first - 1 : last, 5].max()
    assert number(found["largest norm"]) == pytest.approx(largest, rel=1e-4)


def test_a_drag_zooms_into_steps_and_a_double_click_shows_all(tab):
    """The steps under the drag fill the picture, at full resolution."""
    tab.open_alone(run="wide")
    tab.drag(0.5, 0.55)
    first, last = tab.seen
    assert abs(first - 3000) <= 10
    assert abs(last - 3300) <= 10
    assert "step" in tab.hover(0, 0.5)
    tab.frame.locator("canvas.heat").dblclick()
    tab.ready()
    assert tab.seen == (1, data.WIDE_STEPS)


def test_earlier_views_come_back_one_by_one(tab):
    """Escape and Backspace undo a zoom each."""
    tab.open_alone(run="wide")
    tab.drag(0.2, 0.6)
    one = tab.seen
    tab.drag(0.2, 0.6)
    assert tab.seen != one
    tab.frame.locator(".scroll").focus()
    tab.page.keyboard.press("Escape")
    tab.ready()
    assert tab.seen == one
    tab.page.keyboard.press("Backspace")
    tab.ready()
    assert tab.seen == (1, data.WIDE_STEPS)


def test_shift_and_drag_moves_along_the_steps(tab):
    """The step under the hand stays under it; the number of steps stays."""
    tab.open_alone(run="wide", steps="2001-3000")
    tab.drag(0.5, 0.25, key="Shift")
    first, last = tab.seen
    assert last - first == 999
    assert abs(first - 2251) <= 5


def test_ctrl_and_wheel_zooms_at_the_pointer(tab):
    """The step under the pointer stays where it is; a wheel alone does not zoom."""
    tab.open_alone(run="wide")
    tab.page.mouse.move(*tab.point(1, 0.25))
    tab.page.mouse.wheel(0, -100)
    tab.ready()
    assert tab.seen == (1, data.WIDE_STEPS)
    tab.page.keyboard.down("Control")
    for _ in range(4):
        tab.page.mouse.wheel(0, -100)
    tab.page.keyboard.up("Control")
    tab.ready()
    first, last = tab.seen
    assert last - first < 3000
    assert abs(first + 0.25 * (last - first) - 1500) <= 20


def test_the_buttons_zoom_pan_and_reset(tab):
    """What the mouse does has a button too."""
    tab.open_alone(run="wide")
    press = lambda name: tab.frame.get_by_role("button", name=name, exact=True).click()  # noqa: E731
    press("Zoom in")
    tab.ready()
    assert tab.seen == (1501, 4500)
    press("Later steps")
    tab.ready()
    assert tab.seen == (3001, 6000)
    press("Earlier steps")
    press("Zoom out")
    tab.ready()
    assert tab.seen == (1, 6000)
    press("Zoom in")
    press("Reset")
    tab.ready()
    assert tab.seen == (1, 6000)


def test_of_two_zooms_only_the_last_is_drawn(tab):
    """Answers to a view that has been left are dropped."""
    tab.open_alone(run="wide")
    for _ in range(6):
        tab.frame.get_by_role("button", name="Zoom in", exact=True).click()
    tab.ready()
    first, last = tab.seen
    assert last - first < 100
    found = tab.hover(0, 0.5)
    assert first <= int(found["step"].replace(",", "")) <= last


def test_another_run_is_seen_at_the_same_steps_if_it_has_them(tab):
    """The view stays with the steps; a run that ends before them is seen at its own end."""
    tab.open_alone(run="known/a", steps="101-150")
    tab.frame.locator(".run", has_text="known/b").click()
    tab.wait_for_text(".panel-title", "known/b")
    tab.ready()
    assert tab.seen == (101, 150)
    tab.frame.locator(".run", has_text="known/a").click()
    tab.ready()
    tab.frame.locator(".event", has_text="the total norm is large").click()
    tab.ready()
    assert tab.seen == (215, 264)
    tab.frame.locator(".run", has_text="known/b").click()
    tab.wait_for_text(".panel-title", "known/b")
    tab.ready()
    assert tab.seen == (151, 200)

"""The curve of a row, and two runs beside each other."""

import numpy as np

from . import data
from .tab import bad_pixels


def painted(tab):
    """How many pixels of the curve have a colour."""
    script = """() => {
      const canvas = document.querySelector(".curve canvas");
      const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
      let some = 0;
      for (let i = 3; i < data.length; i += 4) some += data[i] > 0;
      return some;
    }"""
    return tab.frame.evaluate(script)


def test_a_click_on_a_row_draws_its_curve(tab):
    """Every window of the parameter, with its name, module and shape."""
    tab.open_alone(run="known/a")
    assert not tab.frame.locator(".curve").is_visible()
    tab.page.mouse.click(*tab.point(4, 0.5))
    tab.wait_for_text(".curve-head", f"{data.STEPS} windows")
    text = tab.frame.locator(".curve-head").text_content()
    assert text.startswith("h.1.attn.q")
    assert "8 \u00d7 4" in text
    label = tab.frame.locator(".curve canvas").get_attribute("aria-label")
    assert "1 bad window" in label
    assert painted(tab) > 2000
    tab.frame.get_by_role("button", name="Close the curve").click()
    tab.ready()
    assert not tab.frame.locator(".curve").is_visible()


def test_the_row_of_the_curve_stays_in_sight(new_tab, board):
    """The curve takes room from the rows, not the row that was clicked."""
    tab = new_tab(board.base_url, height=700).open_alone(run="known/a")
    box = tab.box()
    tab.page.mouse.click(*tab.point(len(tab.labels) - 1, 0.5))
    tab.wait_for_text(".curve-head", "ln_f.bias")
    tab.ready()
    assert tab.box()["height"] < box["height"]
    assert tab.labels[-1] == "ln_f.bias"


def test_the_curve_has_the_steps_in_view(tab):
    """A zoom takes the curve along."""
    tab.open_alone(run="known/a", curve="p:h.0.attn.q", steps="11-60")
    tab.wait_for_text(".curve-head", "50 windows")


def test_the_curve_of_a_module_is_summed_up(tab):
    """A module has a curve too."""
    tab.open_alone(run="known/a", rows="modules", curve="m:h")
    tab.wait_for_text(".curve-head", "module of 16 parameters")
    assert painted(tab) > 2000


def test_two_runs_share_rows_steps_and_scale(tab):
    """Beside each other: the same steps, the same rows, and the same norm has the same colour."""
    tab.open_alone(run="known/a", compare="known/b")
    titles = tab.frame.locator(".panel-title").all_text_contents()
    assert titles == ["known/a", "known/b"]
    assert tab.seen == (1, data.STEPS)
    left, right = tab.row_pixels(0, 0), tab.row_pixels(0, 1)
    assert abs(len(left) - len(right)) <= 1
    # known/b holds three times the norms: brighter, never darker, as far as it goes.
    some = int(len(left) * 190 / data.STEPS)
    light = left[:some].astype(int).sum(1), right[: len(left)][:some].astype(int).sum(1)
    assert np.mean(light[1] >= light[0]) > 0.99
    tab.drag(0.1, 0.5)
    seen = [tab.hover(0, 0.5, panel)["step"] for panel in (0, 1)]
    assert abs(int(seen[0]) - int(seen[1])) <= 1


def test_two_runs_may_lie_above_each_other(tab):
    """Stacked, both have the full width."""
    tab.open_alone(run="known/a", compare="known/b")
    tab.frame.get_by_role("button", name="Stacked").click()
    tab.ready()
    one, other = tab.box(0), tab.box(1)
    assert one["x"] == other["x"]
    assert other["y"] > one["y"] + one["height"]


def test_the_list_of_runs_compares_and_removes(tab):
    """A button in the list puts a second run beside the first, and takes it away."""
    tab.open_alone(run="known/a")
    tab.frame.get_by_role("button", name="Compare known/b").click()
    tab.wait_for("document.querySelectorAll('.panel').length === 2")
    tab.ready()
    tab.frame.get_by_role("button", name="Remove known/b").click()
    tab.ready()
    assert tab.frame.locator(".panel").count() == 1


def test_a_parameter_that_one_run_lacks_is_left_blank_there(tab):
    """Rows are joined by name: what only the other run has follows, and is blank in the first."""
    tab.open_alone(run="known/a", compare="wide", rows="parameters", filter=r"^h\.0|part_1.w")
    rows = tab.labels
    assert rows[:4] == data.NAMES[:4]
    assert rows[4] == data.WIDE_NAMES[1]
    blank = tab.row_pixels(4, 0)
    assert not bad_pixels(blank).any()
    assert (blank == 0).all()
    assert tab.row_pixels(4, 1).any()


def test_two_optimizers_of_a_run_stand_beside_each_other(tab):
    """A run with two optimizers is two entries of the list, each with its own parameters and events."""
    tab.open_alone(run="two", optimizer="Adam", compare="two", compareOptimizer="SGD")
    metas = tab.frame.locator(".panel-meta").all_text_contents()
    assert metas[0].startswith("Adam")
    assert metas[1].startswith("SGD")
    assert tab.labels == ["generator.weight", "critic.weight"]
    assert (tab.row_pixels(1, 0) == 0).all()
    assert tab.row_pixels(1, 1).any()
    assert tab.hover(1, 0.5, panel=1)["run"] == "two \u00b7 SGD"
    assert tab.frame.locator(".event-step").all_text_contents() == ["7", "9"]
    tab.frame.get_by_role("button", name="Remove two").click()
    tab.ready()
    assert tab.frame.locator(".event-step").all_text_contents() == ["7"]

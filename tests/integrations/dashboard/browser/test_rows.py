"""Which rows there are."""

import numpy as np
import pytest

from . import data
from .tab import bad_pixels


def module_norm(names, step):
    """Root of the sum of squares of the parameters that are finite and there."""
    norms = data.known()[step - 1]
    some = [norms[i] for i, name in enumerate(data.NAMES) if name in names]
    return float(np.sqrt(np.sum([x * x for x in some if np.isfinite(x) and x >= 0])))


def number(text):
    """A number as the tab writes it."""
    return float(text.split(" ")[0].replace("\u2212", "-").replace(",", ""))


def test_few_parameters_are_rows_of_their_own_and_many_are_rolled_up(new_tab, board):
    """18 parameters come one by one, 400 by module, opened as far as is easily read."""
    assert new_tab(board.base_url).open_alone(run="known/a").labels == data.NAMES
    labels = new_tab(board.base_url).open_alone(run="wide").labels
    assert labels[:3] == ["model.blocks", "0", "1"]


def test_a_module_is_the_root_of_the_sum_of_squares(tab):
    """A closed module says the norm over its parameters, at the very step."""
    tab.open_alone(run="known/a", rows="modules", open="[]")
    assert tab.labels == ["h", "ln_f"]
    found = tab.hover_step(0, 50, data.STEPS)
    assert found["title"] == "h"
    assert found["module of"] == "16 parameters"
    names = {name for name in data.NAMES if name.startswith("h.")}
    assert number(found["norm"]) == pytest.approx(module_norm(names, 50), rel=1e-4)


def test_a_module_is_bad_if_one_parameter_is_and_has_no_gradient_only_if_none_has(tab):
    """NaN in one of 16 parameters marks the module; a parameter without gradient does not."""
    tab.open_alone(run="known/a", rows="modules", open='["m:h","m:h.2"]')
    labels = tab.labels
    pink = np.flatnonzero(bad_pixels(tab.row_pixels(labels.index("h"))))
    width = len(tab.row_pixels(0))
    for step in (data.NAN_STEP, data.INF_STEP):
        assert np.abs(pink - (step - 0.5) / data.STEPS * width).min() <= 1.5
    # h.2 holds the zero row and the absent row, and two that have norms.
    found = tab.hover_step(labels.index("2"), 50, data.STEPS)
    names = {name for name in data.NAMES if name.startswith("h.2.")}
    assert number(found["norm"]) == pytest.approx(module_norm(names, 50), rel=1e-4)


def test_a_click_on_a_module_opens_and_closes_it(tab):
    """Its children appear below it, and go again."""
    tab.open_alone(run="known/a", rows="modules", open="[]")
    tab.frame.locator(".label", has_text="ln_f").click()
    tab.ready()
    assert tab.labels == ["h", "ln_f", "weight", "bias"]
    tab.frame.locator(".label", has_text="ln_f").click()
    tab.ready()
    assert tab.labels == ["h", "ln_f"]


def test_all_modules_open_and_close_at_once(tab):
    """Expand all shows every parameter, collapse all the top alone."""
    tab.open_alone(run="known/a", rows="modules")
    tab.frame.get_by_role("button", name="Expand all").click()
    tab.ready()
    leaves = [label for label in tab.labels if label in ("q", "k", "up", "down", "weight", "bias")]
    assert len(leaves) == len(data.NAMES)
    tab.frame.get_by_role("button", name="Collapse all").click()
    tab.ready()
    assert tab.labels == ["h", "ln_f"]


def test_the_filter_is_a_regular_expression(tab):
    """Only names that match are rows."""
    tab.open_alone(run="known/a")
    tab.frame.locator(".filter").fill(r"h\.[01].*(q|up)$")
    tab.ready()
    assert tab.labels == ["h.0.attn.q", "h.0.mlp.up", "h.1.attn.q", "h.1.mlp.up"]


def test_a_filter_that_is_no_regular_expression_leaves_the_last_good_one(tab):
    """While someone types a bracket, the rows stay and a quiet note says why."""
    tab.open_alone(run="known/a", filter="ln_f")
    tab.frame.locator(".filter").fill("ln_f(")
    tab.ready()
    assert tab.labels == ["ln_f.weight", "ln_f.bias"]
    assert "Not a regular expression" in tab.frame.locator(".filter-note").text_content()
    tab.frame.locator(".filter").fill("ln_f|h.0")
    tab.ready()
    assert len(tab.labels) == 6
    assert tab.frame.locator(".filter-note").text_content() == ""


def test_a_filter_that_matches_nothing_says_so(tab):
    """The way back is a button."""
    tab.open_alone(run="known/a", filter="no such name")
    assert tab.labels == []
    tab.frame.get_by_role("button", name="Clear the filter").click()
    tab.ready()
    assert tab.labels == data.NAMES


def test_rows_out_of_sight_are_reached_by_scrolling(tab, board):
    """400 rows do not fit: the last one is drawn once it is scrolled to, with its own numbers."""
    tab.open_alone(run="wide", rows="parameters")
    assert data.WIDE_NAMES[-1] not in " ".join(tab.labels)
    tab.frame.locator(".scroll").evaluate("(area) => { area.scrollTop = area.scrollHeight }")
    tab.wait_for_text(".labels", "blocks.99.part_3.weight")
    box = tab.box()
    columns = round(box["width"])
    tab.page.mouse.move(box["x"] + (5 + 0.5) / columns * box["width"], box["y"] + box["height"] - 6)
    found = tab.tooltip()
    norms = board.heatmap("wide", "AdamW", columns=columns)["norms"]
    assert found["title"] == data.WIDE_NAMES[-1]
    assert number(found["largest norm"]) == pytest.approx(norms[-1, 5], rel=1e-4)

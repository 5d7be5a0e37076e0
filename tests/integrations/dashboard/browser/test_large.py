"""A run of 3000 parameters and 10,000 steps."""

import numpy as np
import pytest

from tests.support.board import Board

from . import data
from .tab import bad_pixels

PARAMETERS, STEPS, NAN_STEP, NAN_ROW = 3000, 10_000, 7777, 1234


@pytest.fixture(scope="module")
def large_board(browser, tmp_path_factory):
    """A TensorBoard on one large run."""
    folder = tmp_path_factory.mktemp("large")
    names = [f"layers.{i // 12}.part_{i % 12}.weight" for i in range(PARAMETERS)]
    rng = np.random.default_rng(0)
    with data.LogFile(folder / "run") as log:
        log.add_layout("018000000001", "AdamW", names)
        for first in range(1, STEPS + 1, 500):
            norms = rng.uniform(0.1, 1, (500, PARAMETERS)).astype("f4")
            if first <= NAN_STEP < first + 500:
                norms[NAN_STEP - first, NAN_ROW] = np.nan
            steps = np.arange(first, first + 500)
            log.add_windows("018000000001", norms, (steps, steps), segment=first // 2500)
    with Board(folder) as board:
        yield board


@pytest.mark.slow
def test_a_large_run_is_fetched_in_few_small_answers_and_loses_no_nan(new_tab, large_board):
    """One answer of at most 2.4 million cells for a picture, one for a zoom; the one NaN is seen."""
    sizes = []

    def note(response):
        if "/heatmap?" in response.url:
            sizes.append(int(response.headers["content-length"]))

    tab = new_tab(large_board.base_url, width=1600, height=1000)
    tab.page.on("response", note)
    tab.open_alone(rows="parameters", fit="1")
    assert len(sizes) == 1
    x = (NAN_STEP - 0.5) / STEPS * len(tab.row_pixels(0))
    assert bad_pixels(tab.column_pixels(x)).sum() >= 3
    tab.drag(0.7, 0.8)
    assert len(sizes) == 2
    assert max(sizes) <= 5 * 2.4e6 + 1e5
    first, last = tab.seen
    x = (NAN_STEP - first + 0.5) / (last - first + 1) * len(tab.row_pixels(0))
    assert bad_pixels(tab.column_pixels(x)).sum() >= 3


@pytest.mark.slow
def test_only_rows_in_sight_are_elements(new_tab, large_board):
    """3000 rows are a scroll area with a label for each row that is seen."""
    tab = new_tab(large_board.base_url).open_alone(rows="parameters")
    assert len(tab.labels) < 100
    height = tab.frame.locator(".scroll").evaluate("(area) => area.scrollHeight")
    assert height >= PARAMETERS * 12

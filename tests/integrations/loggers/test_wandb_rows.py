"""Rows that wait for room in W&B: in order, together where their tags differ, in little memory."""

import math
import tracemalloc

import pytest

from gradwatch_loggers.wandb_rows import HeldRows


def taken(rows):
    """Everything that waits, row by row."""
    found = []
    while len(rows):
        found.append(rows.first())
        rows.drop_first()
    return found


def test_the_oldest_row_of_each_series_goes_into_one():
    """Two optimizers share the rows of W&B, and each keeps its order."""
    rows = HeldRows()
    for step in (1, 2):
        rows.add("a/step", step, {"a/x": step / 2})
    rows.add("b/step", 7, {"b/x": math.inf})
    assert (len(rows), rows.has("b/step"), rows.has("c/step")) == (2, True, False)
    assert taken(rows) == [
        {"a/step": 1, "a/x": 0.5, "b/step": 7, "b/x": math.inf},
        {"a/step": 2, "a/x": 1.0},
    ]
    assert (len(rows), rows.first(), rows.has("b/step")) == (0, {}, False)


def test_a_picture_comes_with_the_newest_step():
    """It is part of the row that waits, or a row of its own with the same x-axis."""
    rows = HeldRows()
    rows.add("a/step", 1, {"a/x": 1.0})
    rows.add("a/step", 2, {"a/x": 2.0})
    rows.add_media("a/step", 2, {"a/picture": "first"})
    assert taken(rows)[-1] == {"a/step": 2, "a/x": 2.0, "a/picture": "first"}
    rows.add_media("a/step", 2, {"a/picture": "second"})
    assert taken(rows) == [{"a/step": 2, "a/picture": "second"}]


@pytest.mark.parametrize("count", [9, 10, 11, 50, 1_000])
def test_too_many_rows_are_thinned_evenly(count):
    """Those that are left span the run and hold the newest; the others are counted."""
    rows = HeldRows(most=10)
    for step in range(1, count + 1):
        rows.add("a/step", step, {"a/x": float(step)})
    kept = [row["a/step"] for row in taken(rows)]
    assert len(kept) + rows.lost == count
    assert len(kept) == count if count <= 10 else 5 <= len(kept) <= 10
    assert kept == sorted(kept)
    assert kept[-1] == count
    assert kept[0] <= count / 5


def test_thinning_takes_from_the_longest_series():
    """A series of few rows keeps them all."""
    rows = HeldRows(most=10)
    rows.add("b/step", 1, {"b/x": 1.0})
    for step in range(1, 100):
        rows.add("a/step", step, {"a/x": float(step)})
    assert [row["b/step"] for row in taken(rows) if "b/step" in row] == [1]


def test_a_row_is_small():
    """A row of ten numbers that waits takes less than 300 bytes."""
    rows, tags = HeldRows(), [f"a/{name}" for name in range(10)]
    tracemalloc.start()
    for step in range(1_000):
        rows.add("a/step", step, dict.fromkeys(tags, step / 3))
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 300 * 1_000

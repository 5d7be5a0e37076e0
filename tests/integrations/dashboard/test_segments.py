"""Tensors of a segment: what is damaged is left out, and the rest stays where it belongs."""

from typing import NamedTuple

import numpy as np
import pytest

from gradwatch_dashboard.tensors import decode, encode, read_matrix, read_steps
from gradwatch_dashboard.wire import COLUMNS, Tag

TAG = Tag("steps", "s", 0, 0)
NAN = float("nan")


class Datum(NamedTuple):
    step: int
    wall_time: float
    numpy: np.ndarray


def chunk(number, windows):
    """A table of windows as TensorBoard gives it."""
    rows = np.zeros((len(windows), len(COLUMNS)))
    rows[:, :2] = np.array(windows).reshape(-1, 2)
    return Datum(number, float(number), rows)


def windows(steps):
    """First and last step of each window."""
    return steps.table[:, :2].tolist()


@pytest.mark.parametrize(
    ("rows", "kept"),
    [
        ([(1, 1), (2, 3)], [[1, 1], [2, 3]]),
        ([(1, NAN), (NAN, 2), (3, 3)], [[3, 3]]),
        ([(1, 1), (float("inf"), float("inf")), (2, 2)], [[1, 1], [2, 2]]),
        ([(5, 4), (-1, 2), (1.5, 2), (1, 2.5), (7, 7)], [[7, 7]]),
        ([(1, 4), (4, 5), (3, 3), (5, 6), (6, 6), (7, 7)], [[1, 4], [5, 6], [7, 7]]),
        ([(1, 1), (2, 2.0**60), (3, 3)], [[1, 1], [3, 3]]),
    ],
    ids=["whole", "nan", "inf", "no_steps", "not_rising", "too_large"],
)
def test_windows_without_sense_are_left_out(rows, kept):
    """Steps that are no whole numbers, or do not rise, are left out one by one."""
    assert windows(read_steps("run", TAG, [chunk(1, rows)])) == kept


@pytest.mark.parametrize(
    "array",
    [np.zeros((2, 3)), np.zeros(11), np.zeros((2, 11), "f4"), np.array("text", object),
     np.zeros((0,)), np.zeros((1, 11, 1))],
    ids=str,
)  # fmt: skip
def test_a_table_of_another_shape_or_type_is_left_out(array):
    """A chunk that is no table goes, its neighbours stay."""
    steps = read_steps("run", TAG, [chunk(1, [(1, 1)]), Datum(2, 2.0, array), chunk(3, [(3, 3)])])
    assert windows(steps) == [[1, 1], [3, 3]]


def test_cells_stay_with_their_windows():
    """Rows of cells go with the windows that are left out; a missing chunk leaves nothing there."""
    steps = read_steps("run", TAG, [chunk(1, [(1, 1), (1, 1), (2, 2)]), chunk(2, [(3, 3)]), chunk(3, [(4, 4)])])  # fmt: skip
    norms = [
        Datum(3, 3.0, np.array([[4, 40]], "f4")),  # in another order, as in no file
        Datum(1, 1.0, np.array([[1, 10], [9, 90], [2, np.nan]], "f4")),
        Datum(2, 2.0, np.array([[3, 30], [3, 30]], "f4")),  # a row too many
        Datum(7, 7.0, np.array([[7, 70]], "f4")),  # without steps
    ]
    bad = [Datum(1, 1.0, np.array([[0, 0], [8, 8], [0, 1]], "u2")), Datum(2, 2.0, np.zeros((0, 2), "u2"))]  # fmt: skip
    matrix = read_matrix("run", TAG, steps, 2, norms, bad)
    np.testing.assert_array_equal(
        decode(matrix.norms), np.array([[1, 10], [2, np.nan], [-2, -2], [4, 40]], "f4")
    )
    assert matrix.bad_rows.tolist() == [1]
    assert matrix.bad.tolist() == [[0, 1]]


def test_codes_come_back():
    """NaN, Inf and norms survive being coded; what is no norm becomes NaN."""
    values = np.array([0, 3, -1, np.nan, np.inf, -np.inf, -7, 1e38], "f4")
    decoded = decode(encode(values))
    np.testing.assert_array_equal(decoded, np.array([0, 3, -1, np.nan, np.inf, np.inf, np.nan, 1e38], "f4"))  # fmt: skip

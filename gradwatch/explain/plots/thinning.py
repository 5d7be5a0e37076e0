"""Thinning: which points of a long curve to draw, so that none that would be seen is missing."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def column_of(x: Array, columns: int) -> Array:
    """Finds the column of pixels of each point.

    Args:
        x: int array ``[points]``, rising.
        columns: How many there are over the whole width.

    Returns:
        int64 ``[points]``, rising.
    """
    span = int(x[-1]) - int(x[0]) + 1
    columns_of: Array = (x - x[0]) * columns // span
    return columns_of


def starts_of(columns: Array) -> Array:
    """Finds where runs of equal numbers begin.

    Args:
        columns: int array ``[points]``, not empty.
    """
    return np.concatenate([[0], np.flatnonzero(np.diff(columns)) + 1])


def extremes(x: Array, y: Array, columns: int) -> Array:
    """Chooses the lowest and the highest point of each column of pixels.

    Args:
        x: int array ``[points]``, rising.
        y: float array ``[points]``; NaN where nothing is drawn.
        columns: How many there are over the whole width.

    Returns:
        int64: the points to draw, rising; all of a short curve, at most two per column of a long
        one. A column of NaN keeps one of them, so that a gap stays a gap.
    """
    if len(x) <= 2 * columns:
        return np.arange(len(x))
    starts = starts_of(column_of(x, columns))
    sizes = np.diff(np.append(starts, len(x)))
    chosen = [
        _first(y == np.repeat(bound.reduceat(y, starts), sizes), starts, sizes)
        for bound in (np.fmin, np.fmax)
    ]
    return np.unique(np.concatenate(chosen))


def first_per_column(x: Array, columns: int) -> Array:
    """Chooses one mark for each column of pixels that has any.

    Args:
        x: int array ``[marks]``, rising.
        columns: How many there are over the whole width.

    Returns:
        Part of ``x``.
    """
    if len(x) <= columns:
        return x
    return x[starts_of(column_of(x, columns))]


def _first(wanted: Array, starts: Array, sizes: Array) -> Array:
    """Finds the first wanted point from each start on, or the start where there is none."""
    places = np.flatnonzero(wanted)
    groups = np.repeat(np.arange(len(starts)), sizes)[places]
    first: Array = starts.copy()
    # Written from the last to the first, so that the first one stays.
    first[groups[::-1]] = places[::-1]
    return first

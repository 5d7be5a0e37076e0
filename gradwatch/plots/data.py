"""Fits data to a picture: points by pixel column, and parameters grouped into rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gradwatch.record.columns import Array
from gradwatch.record.records import Layout


def column_of(x: Array, columns: int) -> Array:
    """Returns the pixel column of each point.

    Args:
        x: int array ``[points]``, ascending.
        columns: Number of pixel columns over the whole width.

    Returns:
        int64 ``[points]``, ascending.
    """
    span = int(x[-1]) - int(x[0]) + 1
    columns_of: Array = (x - x[0]) * columns // span
    return columns_of


def starts_of(columns: Array) -> Array:
    """Returns the indices at which runs of equal numbers begin.

    Args:
        columns: int array ``[points]``, not empty.
    """
    return np.concatenate([[0], np.flatnonzero(np.diff(columns)) + 1])


def extremes(x: Array, y: Array, columns: int) -> Array:
    """Chooses the lowest and the highest point of each pixel column.

    Args:
        x: int array ``[points]``, ascending.
        y: float array ``[points]``; NaN where nothing is drawn.
        columns: Number of pixel columns over the whole width.

    Returns:
        int64, ascending: the indices of the points to draw. All points of a short curve; at most
        two per column of a long one. A column of NaN keeps one point, so that a gap stays a gap.
    """
    # A line with many points per pixel takes seconds to draw, and shows only its extremes anyway.
    if len(x) <= 2 * columns:
        return np.arange(len(x))
    starts = starts_of(column_of(x, columns))
    sizes = np.diff(np.append(starts, len(x)))
    chosen = [
        _first(y == np.repeat(bound.reduceat(y, starts), sizes), starts, sizes)
        # Not np.minimum: a single NaN would hide the extremes of its whole column.
        for bound in (np.fmin, np.fmax)
    ]
    return np.unique(np.concatenate(chosen))


def first_per_column(x: Array, columns: int) -> Array:
    """Chooses one mark for each pixel column that has any.

    Args:
        x: int array ``[marks]``, ascending.
        columns: Number of pixel columns over the whole width.

    Returns:
        The chosen elements of ``x``.
    """
    if len(x) <= columns:
        return x
    return x[starts_of(column_of(x, columns))]


def _first(wanted: Array, starts: Array, sizes: Array) -> Array:
    """Returns the first wanted point of each run, or the start of the run if there is none."""
    points = np.flatnonzero(wanted)
    groups = np.repeat(np.arange(len(starts)), sizes)[points]
    first: Array = starts.copy()
    # Assign in reverse order: the first point of each group is written last, and stays.
    first[groups[::-1]] = points[::-1]
    return first


@dataclass(frozen=True, slots=True)
class Rows:
    """How parameters are grouped into rows.

    Attributes:
        labels: Name of each row, from top to bottom.
        row_of: int64 ``[parameters]``: the row of each parameter.
    """

    labels: tuple[str, ...]
    row_of: Array

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def rolled_up(self) -> bool:
        """Whether a row may stand for several parameters."""
        return len(self) < len(self.row_of)

    def norms(self, norms: Array, present: Array) -> Array:
        """Returns the norm of all gradients in each row.

        Args:
            norms: float64 ``[steps, parameters]``.
            present: bool ``[steps, parameters]``: whether there was a gradient.

        Returns:
            float64 ``[steps, rows]``; NaN if there was no gradient, and not finite if one of the
            gradients was not.
        """
        there = self.present(present)
        # One parameter per row: copy, because squaring would underflow for the smallest norms.
        if not self.rolled_up:
            order = np.argsort(self.row_of)
            return np.where(there, norms[:, order], np.nan)
        # An absent gradient counts as 0: its NaN would turn the whole module into NaN.
        squares = np.square(norms, where=present, out=np.zeros_like(norms))
        with np.errstate(invalid="ignore", over="ignore"):
            total = np.sqrt(self._gathered(np.add, squares))
        return np.where(there, total, np.nan)

    def present(self, present: Array) -> Array:
        """Tells which rows had a gradient: ``[steps, parameters]`` to ``[steps, rows]``."""
        # True for nearly every run, and far faster than grouping.
        if present.all():
            return np.ones((len(present), len(self)), bool)
        return self._gathered(np.logical_or, present)

    def _gathered(self, how: np.ufunc, matrix: Array) -> Array:
        # reduceat needs runs of neighbors, and the parameters of a module need not be neighbors.
        order = np.argsort(self.row_of, kind="stable")
        starts = np.searchsorted(self.row_of[order], np.arange(len(self)))
        gathered: Array = how.reduceat(matrix[:, order], starts, axis=1)
        return gathered


def rows_of(layout: Layout, most: int) -> Rows:
    """Chooses the finest grouping of parameters that fits.

    Args:
        layout: Gives names, modules and model order.
        most: Maximum number of rows.

    Returns:
        One row per parameter if they fit; otherwise one per module, or per module higher up in the
        model, in model order. If even those are too many, neighbors are put together.
    """
    keys: Sequence[str] = layout.names
    for keys in _coarser(layout):
        if len(set(keys)) <= most:
            return _rows(keys)
    each = -(-len(keys) // most)
    return _rows([f"{keys[i - i % each]} \N{HORIZONTAL ELLIPSIS}" for i in range(len(keys))])


def _coarser(layout: Layout) -> Iterator[Sequence[str]]:
    yield layout.names
    parts = [module.split(".") for module in layout.modules]
    for depth in range(max(map(len, parts), default=0), 0, -1):
        yield [".".join(path[:depth]) for path in parts]


def _rows(keys: Sequence[str]) -> Rows:
    # A Counter keeps the order of its keys, here model order.
    counts = Counter(keys)
    row = {key: number for number, key in enumerate(counts)}
    labels = [key if n == 1 else f"{key or 'model'} ({n})" for key, n in counts.items()]
    return Rows(tuple(labels), np.array([row[key] for key in keys], np.int64))

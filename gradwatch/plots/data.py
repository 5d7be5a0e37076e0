"""What a picture has room for: points by column of pixels, and parameters gathered into rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gradwatch.record.columns import Array
from gradwatch.record.records import Layout


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
    # A line of many points per pixel takes seconds to draw, and shows only its extremes anyway.
    if len(x) <= 2 * columns:
        return np.arange(len(x))
    starts = starts_of(column_of(x, columns))
    sizes = np.diff(np.append(starts, len(x)))
    chosen = [
        _first(y == np.repeat(bound.reduceat(y, starts), sizes), starts, sizes)
        # Not np.minimum, for which one NaN would hide the extremes of its whole column.
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
    points = np.flatnonzero(wanted)
    groups = np.repeat(np.arange(len(starts)), sizes)[points]
    first: Array = starts.copy()
    # Written from the last to the first, so that the first one stays.
    first[groups[::-1]] = points[::-1]
    return first


@dataclass(frozen=True, slots=True)
class Rows:
    """How parameters are gathered into rows.

    Attributes:
        labels: Name of each row, from above to below.
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
        """Returns the norm of all gradients of each row.

        Args:
            norms: float64 ``[steps, parameters]``.
            present: bool like it: whether there was a gradient.

        Returns:
            float64 ``[steps, rows]``; NaN where there was no gradient, and not finite where one of
            them was not.
        """
        there = self.present(present)
        # As it is where it can be: the root of a square loses the smallest norms to underflow.
        if not self.rolled_up:
            order = np.argsort(self.row_of)
            return np.where(there, norms[:, order], np.nan)
        # 0 for an absent gradient, whose NaN would make NaN of its module.
        squares = np.square(norms, where=present, out=np.zeros_like(norms))
        with np.errstate(invalid="ignore", over="ignore"):
            total = np.sqrt(self._gathered(np.add, squares))
        return np.where(there, total, np.nan)

    def present(self, present: Array) -> Array:
        """Tells in which rows there was a gradient: bool ``[steps, parameters]`` to rows."""
        # Nearly always, and far faster than to gather.
        if present.all():
            return np.ones((len(present), len(self)), bool)
        return self._gathered(np.logical_or, present)

    def _gathered(self, how: np.ufunc, matrix: Array) -> Array:
        # reduceat takes runs of neighbours, and a module's parameters need not be neighbours.
        order = np.argsort(self.row_of, kind="stable")
        starts = np.searchsorted(self.row_of[order], np.arange(len(self)))
        gathered: Array = how.reduceat(matrix[:, order], starts, axis=1)
        return gathered


def rows_of(layout: Layout, most: int) -> Rows:
    """Chooses the finest rows that fit.

    Args:
        layout: The parameters.
        most: How many rows there may be.

    Returns:
        Each parameter, else their modules, else modules higher up in the model, in model order; of
        a model that is flat and wide neighbours are put together.
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
    # A Counter keeps the order in which its keys came: that of the model.
    counts = Counter(keys)
    row = {key: number for number, key in enumerate(counts)}
    labels = [key if n == 1 else f"{key or 'model'} ({n})" for key, n in counts.items()]
    return Rows(tuple(labels), np.array([row[key] for key in keys], np.int64))

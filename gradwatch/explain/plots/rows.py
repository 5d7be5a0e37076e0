"""Rows: the parameters of a picture, or modules of them where there are more than fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gradwatch.explain.plots.thinning import Array
from gradwatch.record.batch import Layout


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
        """Takes the norm of all gradients of each row.

        Args:
            norms: float64 ``[steps, parameters]``.
            present: bool like it: whether there was a gradient.

        Returns:
            float64 ``[steps, rows]``; NaN where there was no gradient, and not finite where one of
            them was not.
        """
        there = self.present(present)
        if not self.rolled_up:
            order = np.argsort(self.row_of)
            return np.where(there, norms[:, order], np.nan)
        squares = np.square(norms, where=present, out=np.zeros_like(norms))
        with np.errstate(invalid="ignore", over="ignore"):
            total = np.sqrt(self._gathered(np.add, squares))
        return np.where(there, total, np.nan)

    def present(self, present: Array) -> Array:
        """Tells in which rows there was a gradient.

        Args:
            present: bool ``[steps, parameters]``.

        Returns:
            bool ``[steps, rows]``.
        """
        if present.all():
            return np.ones((len(present), len(self)), bool)
        return self._gathered(np.logical_or, present)

    def _gathered(self, how: np.ufunc, matrix: Array) -> Array:
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
        if len(dict.fromkeys(keys)) <= most:
            return _rows(keys)
    each = -(-len(keys) // most)
    return _rows([f"{keys[i - i % each]} \N{HORIZONTAL ELLIPSIS}" for i in range(len(keys))])


def _coarser(layout: Layout) -> Iterator[Sequence[str]]:
    yield layout.names
    parts = [module.split(".") for module in layout.modules]
    for depth in range(max(map(len, parts), default=0), 0, -1):
        yield [".".join(path[:depth]) for path in parts]


def _rows(keys: Sequence[str]) -> Rows:
    counts = Counter(keys)
    place = {key: row for row, key in enumerate(counts)}
    labels = [key if n == 1 else f"{key or 'model'} ({n})" for key, n in counts.items()]
    return Rows(tuple(labels), np.array([place[key] for key in keys], np.int64))

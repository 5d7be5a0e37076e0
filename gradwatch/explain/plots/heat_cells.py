"""HeatCells: the numbers of a heat map; bins of steps keep their maximum and what is not finite."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from gradwatch.explain.plots.blocks import Block
from gradwatch.explain.plots.rows import Rows
from gradwatch.explain.plots.thinning import Array, starts_of


@dataclass(frozen=True, slots=True)
class HeatCells:
    """A matrix of cells.

    Attributes:
        norms: float64 ``[rows, bins]``: the largest finite norm; NaN where there is none.
        bad: int64 like it: how many norms were NaN or Inf.
    """

    norms: Array
    bad: Array

    @property
    def zero(self) -> Array:
        """Bool ``[rows, bins]``: whether no norm was other than exactly 0."""
        zero: Array = (self.norms == 0) & (self.bad == 0)
        return zero

    @property
    def absent(self) -> Array:
        """Bool ``[rows, bins]``: whether there was no gradient."""
        absent: Array = np.isnan(self.norms) & (self.bad == 0)
        return absent

    def relative(self) -> Array:
        """Divides the norms of each row by the row's typical one.

        Returns:
            float64 ``[rows, bins]``; the median of the positive numbers of each row is 1.
        """
        positive = np.where(self.norms > 0, self.norms, np.nan)
        typical = np.full(len(positive), np.nan)
        some = np.isfinite(positive).any(axis=1)
        if some.any():
            typical[some] = np.nanmedian(positive[some], axis=1)
        relative: Array = self.norms / typical[:, None]
        return relative


def heat_cells(blocks: Iterable[Block], rows: Rows, first: int, last: int, bins: int) -> HeatCells:
    """Fills the cells.

    Args:
        blocks: Every step from the first to the last, with ``grad_norm``.
        rows: The rows.
        first: The first step.
        last: The last step.
        bins: How many steps or ranges of steps there are in a row.
    """
    norms = np.full((bins, len(rows)), -1.0)
    bad = np.zeros((bins, len(rows)), np.int64)
    for block in blocks:
        gathered = rows.norms(block.planes["grad_norm"], block.present)
        steps = block.first + np.arange(len(gathered))
        bin_of = (steps - first) * bins // (last - first + 1)
        starts = starts_of(bin_of)
        finite = np.isfinite(gathered)
        if not finite.all():  # which it is nearly everywhere
            there = rows.present(block.present)
            gathered = np.where(finite, gathered, -1.0)
            amiss = (there & ~finite).astype(np.int64)
            bad[bin_of[starts]] += np.add.reduceat(amiss, starts, axis=0)
        highest = np.maximum.reduceat(gathered, starts, axis=0)
        norms[bin_of[starts]] = np.maximum(norms[bin_of[starts]], highest)
    return HeatCells(np.where(norms < 0, np.nan, norms).T, bad.T)

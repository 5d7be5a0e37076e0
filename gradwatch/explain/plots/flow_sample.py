"""FlowSample: quantiles of the norms of each row over the steps of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.explain.plots.blocks import Range, blocks, spread_steps
from gradwatch.explain.plots.rows import Rows
from gradwatch.explain.plots.thinning import Array

if TYPE_CHECKING:
    from gradwatch.explain.report.records import Records

MOST_NUMBERS, PIECES = 3_000_000, 12
"""Numbers that are read at most, and the ranges of steps that they are taken from."""

BAND = (0.05, 0.5, 0.95)


@dataclass(frozen=True, slots=True)
class FlowSample:
    """What became of each row.

    Attributes:
        low: float64 ``[rows]``: 5th percentile of the positive norms; NaN where there is none.
        median: float64 ``[rows]``: their median.
        high: float64 ``[rows]``: their 95th percentile.
        zero: bool ``[rows]``: whether most norms are exactly 0.
        bad: int64 ``[rows]``: steps in which it was NaN or Inf.
        steps: int64 ``[rows]``: steps in which there was a gradient.
    """

    low: Array
    median: Array
    high: Array
    zero: Array
    bad: Array
    steps: Array


def sample_ranges(first: int, last: int, parameters: int) -> list[Range]:
    """Chooses the steps that a table or a plot of the flow looks at.

    Args:
        first: The first step of the run.
        last: The last one.
        parameters: Numbers per step.
    """
    return spread_steps(first, last, max(PIECES, MOST_NUMBERS // max(1, parameters)), PIECES)


def flow_sample(history: Records, rows: Rows, first: int, last: int) -> FlowSample:
    """Reads the norms and sums them up.

    Args:
        history: The run.
        rows: The rows.
        first: The first step.
        last: The last step.
    """
    read = blocks(history, ["grad_norm"], sample_ranges(first, last, len(rows.row_of)))
    parts = [
        (rows.norms(block.planes["grad_norm"], block.present), rows.present(block.present))
        for block in read
    ]
    norms = np.concatenate([norms for norms, _ in parts])
    there = np.concatenate([there for _, there in parts])
    finite = np.isfinite(norms)
    low, median, high = quantiles(np.where(finite & (norms > 0), norms, np.nan), BAND)
    zero = np.count_nonzero(finite & (norms == 0), axis=0) > there.sum(axis=0) / 2
    return FlowSample(low, median, high, zero, (there & ~finite).sum(axis=0), there.sum(axis=0))


def quantiles(matrix: Array, shares: tuple[float, ...]) -> Array:
    """Takes quantiles of the numbers of each column that are no NaN.

    Args:
        matrix: float ``[steps, columns]``.
        shares: From 0 to 1.

    Returns:
        float64 ``[shares, columns]``, NaN where there is none.
    """
    import pandas as pd

    frame = pd.DataFrame(matrix)
    return np.stack([frame.quantile(share).to_numpy(float) for share in shares])

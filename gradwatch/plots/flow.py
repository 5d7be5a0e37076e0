"""The gradient flow, parameter by parameter, as a plot; its table is made in report/flow.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from gradwatch.plots.canvas import (
    BLUE,
    EMPTY,
    GREY,
    NONFINITE,
    ORANGE,
    SMALLEST_POINTS,
    canvas,
    dress,
    height_inches,
    legend_below,
    log_norms,
    name_rows,
    say,
    tint,
)
from gradwatch.plots.data import Rows, rows_of
from gradwatch.record.columns import Array, Source, Span, array_of
from gradwatch.report.flow import flow_ranges, quantiles
from gradwatch.report.run_data import Range, read_blocks

ROW_INCHES, THINNEST_ROW_INCHES = 0.16, 0.088
LOWEST_INCHES, HIGHEST_INCHES = 3.0, 28.0
AROUND_INCHES = 1.1
EDGE = 0.985
BAND = (0.05, 0.5, 0.95)


def draw_flow(source: Source, ax: Axes | None, span: Span) -> Axes:
    """Draws the plot; see :meth:`gradwatch.History.plot_flow`."""
    layout = source.layout()
    ax = canvas(ax, 8.5, _height(len(layout.names)) + AROUND_INCHES)
    dress(ax, "Gradient flow: norm by parameter, first layer on top")
    ax.set_xlabel("gradient norm (L2): median of the steps, bar from 5 to 95 %")
    steps = array_of(source.steps(("step",), span)["step"])
    if not len(steps) or not layout.names:
        return say(ax, EMPTY)
    rows = rows_of(layout, max(1, int(height_inches(ax) / THINNEST_ROW_INCHES)))
    ranges = flow_ranges(int(steps.min()), int(steps.max()), len(layout.names))
    band = _flow_band(source, rows, ranges)
    ax.set_xscale("log")
    name_rows(ax, rows.labels)
    _draw_bands(ax, rows, band, layout.shapes)
    _limit(ax, band)
    log_norms(ax.xaxis)
    _mark(ax, band)
    legend_below(ax, columns=3)
    return ax


def _height(names: int) -> float:
    """Returns a comfortable height in inches, or the least readable one if that is too tall."""
    comfortable = min(ROW_INCHES * names, max(9.0, THINNEST_ROW_INCHES * 1.02 * names))
    return min(max(comfortable, LOWEST_INCHES), HIGHEST_INCHES)


@dataclass(frozen=True, slots=True)
class FlowBand:
    """The numbers that are drawn for each row.

    Attributes:
        low: float64 ``[rows]``: 5th percentile of the positive norms; NaN if there is none.
        median: float64 ``[rows]``: median of the positive norms.
        high: float64 ``[rows]``: 95th percentile of the positive norms.
        zero: bool ``[rows]``: whether most norms are exactly 0.
        bad: int64 ``[rows]``: number of steps in which the norm was NaN or Inf.
        steps: int64 ``[rows]``: number of steps in which there was a gradient.
    """

    low: Array
    median: Array
    high: Array
    zero: Array
    bad: Array
    steps: Array


def _flow_band(source: Source, rows: Rows, ranges: Sequence[Range]) -> FlowBand:
    """Reads the norms and computes what is drawn for each row."""
    # Group block by block, so that for a large model only rows are kept, not every parameter.
    parts = [
        (rows.norms(block["grad_norm"], block.present), rows.present(block.present))
        for block in read_blocks(source, ["grad_norm"], ranges)
    ]
    norms, there = map(np.concatenate, zip(*parts, strict=True))
    finite = np.isfinite(norms)
    low, median, high = quantiles(np.where(finite & (norms > 0), norms, np.nan), BAND)
    zero = np.count_nonzero(finite & (norms == 0), axis=0) > there.sum(axis=0) / 2
    return FlowBand(low, median, high, zero, (there & ~finite).sum(axis=0), there.sum(axis=0))


def _draw_bands(ax: Axes, rows: Rows, band: FlowBand, shapes: Sequence[tuple[int, ...]]) -> None:
    """Draws matrices and vectors as two curves, because their norms differ in scale."""
    matrix = np.zeros(len(rows), bool)
    # Without shapes all parameters count as matrices; so does a module that holds a matrix.
    ranks = np.array([len(shape) for shape in shapes] or [2] * len(rows.row_of))
    np.logical_or.at(matrix, rows.row_of, ranks >= 2)
    alone = matrix.all() or not matrix.any()
    kinds = (
        (matrix, BLUE, "o", "modules" if rows.rolled_up else "weights"),
        (~matrix, ORANGE, "D", "biases, norms and other vectors"),
    )
    for mask, color, marker, label in kinds:
        _draw_kind(ax, np.flatnonzero(mask), band, color, marker, "median" if alone else label)


def _draw_kind(ax: Axes, rows: Array, band: FlowBand, color: str, marker: str, label: str) -> None:
    rows = rows[np.isfinite(band.median[rows])]
    if not len(rows):
        return
    low, median, high = band.low[rows], band.median[rows], band.high[rows]
    shown: dict[str, Any] = {"color": color, "alpha": tint(ax, 0.3), "linewidth": 5.0}
    ax.hlines(rows, low, high, **shown)
    ax.plot(median, rows, color=color, linewidth=0.8, alpha=0.6)
    ax.plot(median, rows, marker, color=color, markersize=3.6, markeredgewidth=0, label=label)


def _limit(ax: Axes, band: FlowBand) -> None:
    ends = np.concatenate([band.low, band.high])
    ends = ends[np.isfinite(ends)]
    low, high = (np.log10(ends.min()), np.log10(ends.max())) if len(ends) else (-1.0, 1.0)
    margin = max(0.06 * (high - low), (1.0 - (high - low)) / 2)
    ax.set_xlim(10 ** (low - margin), 10 ** (high + margin))


def _mark(ax: Axes, band: FlowBand) -> None:
    """Marks at the edges what a logarithmic axis cannot show."""
    kinds = (
        (band.bad > 0, EDGE, ">", NONFINITE, "NaN or Inf in a step"),
        (band.zero, 1 - EDGE, "<", GREY, "exactly 0 in most steps"),
        (band.steps == 0, 1 - EDGE, "x", GREY, "no gradient"),
    )
    for mask, share, marker, color, label in kinds:
        rows = np.flatnonzero(mask)
        if len(rows):
            ax.plot(
                np.full(len(rows), share),
                rows,
                marker,
                color=color,
                markersize=SMALLEST_POINTS,
                # x is a share of the width, y a row.
                transform=ax.get_yaxis_transform(),
                label=f"{label} ({len(rows):,})",
            )

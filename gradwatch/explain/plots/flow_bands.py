"""The gradient norm layer by layer: medians and bands over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from gradwatch.explain.plots.canvas import EMPTY, canvas, dress, legend_below, log_norms, say, tint
from gradwatch.explain.plots.flow_sample import FlowSample, flow_sample
from gradwatch.explain.plots.norms import bounds
from gradwatch.explain.plots.palette import BLUE, GREY, NONFINITE, ORANGE
from gradwatch.explain.plots.row_names import SMALLEST_POINTS, name_rows
from gradwatch.explain.plots.rows import Rows, rows_of
from gradwatch.explain.plots.step_tracks import step_tracks
from gradwatch.explain.plots.thinning import Array

if TYPE_CHECKING:
    from gradwatch.explain.report.records import Records

ROW_INCHES, THINNEST_ROW_INCHES = 0.16, 0.088
LOWEST_INCHES, HIGHEST_INCHES = 3.0, 28.0
AROUND_INCHES = 1.1
EDGE = 0.985


def draw_flow(history: Records, ax: Axes | None, start: int | None, stop: int | None) -> Axes:
    """Draws the plot; see :func:`gradwatch.explain.plots.plot_flow`."""
    layout = history.layout
    ax = canvas(ax, 8.5, _height(len(layout.names)) + AROUND_INCHES)
    dress(ax, "Gradient flow: norm by parameter, first layer above")
    ax.set_xlabel("gradient norm (L2): median of the steps, bar from 5 to 95 %")
    tracks = step_tracks(history, ("grad_norm",), start, stop)
    if not tracks or not layout.names:
        return say(ax, EMPTY)
    inches = ax.get_window_extent().height / ax.figure.dpi
    rows = rows_of(layout, max(1, int(inches / THINNEST_ROW_INCHES)))
    sample = flow_sample(history, rows, *bounds(tracks))
    ax.set_xscale("log")
    name_rows(ax, rows.labels)
    _draw_bands(ax, rows, sample, layout.shapes)
    _limit(ax, sample)
    log_norms(ax.xaxis)
    _mark(ax, sample)
    legend_below(ax, columns=3)
    return ax


def _height(names: int) -> float:
    """As high as comfortable, then as low as can be read."""
    comfortable = min(ROW_INCHES * names, max(9.0, THINNEST_ROW_INCHES * 1.02 * names))
    return min(max(comfortable, LOWEST_INCHES), HIGHEST_INCHES)


def _draw_bands(
    ax: Axes, rows: Rows, sample: FlowSample, shapes: Sequence[tuple[int, ...]]
) -> None:
    """Draws matrices and vectors as two curves: their norms are never alike."""
    matrix = np.zeros(len(rows), bool)
    ranks = np.array([len(shape) for shape in shapes] or [2] * len(rows.row_of))
    np.logical_or.at(matrix, rows.row_of, ranks >= 2)
    alone = matrix.all() or not matrix.any()
    kinds = (
        (matrix, BLUE, "o", "modules" if rows.rolled_up else "weights"),
        (~matrix, ORANGE, "D", "biases, norms and other vectors"),
    )
    for mask, color, marker, label in kinds:
        _draw_kind(ax, np.flatnonzero(mask), sample, color, marker, "median" if alone else label)


def _draw_kind(
    ax: Axes, rows: Array, sample: FlowSample, color: str, marker: str, label: str
) -> None:
    rows = rows[np.isfinite(sample.median[rows])]
    if not len(rows):
        return
    thick = min(5.0, max(2.0, 72 * ROW_INCHES * 0.5))
    low, median, high = sample.low[rows], sample.median[rows], sample.high[rows]
    shown: dict[str, Any] = {"color": color, "alpha": tint(ax, 0.3), "linewidth": thick}
    ax.hlines(rows, low, high, **shown)
    ax.plot(median, rows, color=color, linewidth=0.8, alpha=0.6)
    ax.plot(median, rows, marker, color=color, markersize=3.6, markeredgewidth=0, label=label)


def _limit(ax: Axes, sample: FlowSample) -> None:
    ends = np.concatenate([sample.low, sample.high])
    ends = ends[np.isfinite(ends)]
    low, high = (np.log10(ends.min()), np.log10(ends.max())) if len(ends) else (-1.0, 1.0)
    margin = max(0.06 * (high - low), (1.0 - (high - low)) / 2)
    ax.set_xlim(10 ** (low - margin), 10 ** (high + margin))


def _mark(ax: Axes, sample: FlowSample) -> None:
    """Marks at the edges what a logarithmic axis has no place for."""
    kinds = (
        (sample.bad > 0, EDGE, ">", NONFINITE, "NaN or Inf in a step"),
        (sample.zero, 1 - EDGE, "<", GREY, "exactly 0 in most steps"),
        (sample.steps == 0, 1 - EDGE, "x", GREY, "no gradient"),
    )
    for mask, place, marker, color, label in kinds:
        rows = np.flatnonzero(mask)
        if len(rows):
            ax.add_line(
                Line2D(
                    np.full(len(rows), place),
                    rows,
                    linestyle="",
                    marker=marker,
                    color=color,
                    markersize=SMALLEST_POINTS,
                    transform=ax.get_yaxis_transform(),
                    label=f"{label} ({len(rows):,})",
                )
            )

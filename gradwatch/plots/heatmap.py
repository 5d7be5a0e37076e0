"""The gradient norm of every parameter at every step, as a heatmap."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.collections import PolyCollection
from matplotlib.colors import Colormap, LogNorm
from matplotlib.patches import Patch

from gradwatch.plots.canvas import (
    EMPTY,
    GREY,
    NO_GRADIENT_GREY,
    NONFINITE,
    NORM_MAP,
    RELATIVE_MAP,
    ZERO,
    canvas,
    dress,
    height_inches,
    ink_of,
    inset,
    legend_below,
    log_norms,
    name_rows,
    pixel_columns,
    say,
    step_axis,
)
from gradwatch.plots.data import Rows, rows_of, starts_of
from gradwatch.plots.norms import (
    colors_of,
    draw_curve,
    draw_edges,
    draw_threshold,
    positive,
    thresholds,
)
from gradwatch.record.columns import Array, Source, Span
from gradwatch.report.run_data import (
    OptimizerArrays,
    ParameterSample,
    first_and_last,
    medians,
    read_blocks,
    read_steps,
)

COLUMNS = ("grad_norm", "clip_threshold", "clipped", "nonfinite_parameters")
ROW_INCHES, LOWEST_INCHES, HIGHEST_INCHES = 0.125, 2.6, 13.0
AROUND_INCHES = 2.0
LEAST_PIXELS = 3.0

TAIL = 0.5
"""Percentage of cells at each end that may lie outside the color scale, so that a spike does not
use up the colors of all other cells. Such cells get the last color."""

LEAST_FACTOR, LARGEST_FACTOR = 10.0, 1_000.0
"""Bounds on the range of the color scale for relative norms."""


def draw_heatmap(source: Source, ax: Axes | None, span: Span, relative: bool) -> Axes:
    """Draws the plot; see :meth:`gradwatch.History.plot_heatmap`."""
    layout = source.layout()
    height = min(max(ROW_INCHES * len(layout.names), LOWEST_INCHES), HIGHEST_INCHES)
    ax = canvas(ax, 10.0, height + AROUND_INCHES)
    what = "Gradient norm over the parameter's typical one" if relative else "Gradient norm"
    dress(ax, f"{what}, by parameter and step", grid=False)
    optimizers = read_steps(source, COLUMNS, span)
    if not optimizers or not layout.names:
        return say(ax, EMPTY)
    first, last = first_and_last(optimizers)
    rows = rows_of(layout, max(1, int(ax.get_window_extent().height / LEAST_PIXELS)))
    step_axis(ax, first, last)
    name_rows(ax, rows.labels)
    ax.spines[:].set_visible(False)
    _draw_strip(ax, optimizers)
    # Lay out the names first: only then is the width known, and with it the number of cells.
    figure: Any = ax.figure
    figure.draw_without_rendering()
    name_rows(ax, rows.labels)
    bins = min(last - first + 1, pixel_columns(ax))
    blocks = read_blocks(source, ["grad_norm"], [(first, last + 1)])
    cells = _heat_cells(blocks, rows, first, last, bins)
    _draw_cells(ax, cells, relative)
    _mark(ax, cells)
    return ax


def _draw_strip(ax: Axes, optimizers: Sequence[OptimizerArrays]) -> None:
    """Draws the total norm in a strip above the heatmap."""
    inches = height_inches(ax)
    strip = inset(ax, (0.0, 1.0 + 0.06 / inches, 1.0, max(0.12, 0.7 / inches)), sharex=ax)
    dress(strip)
    strip.set_yscale("log")
    colors = colors_of(optimizers)
    norms = [positive(steps["grad_norm"]) for steps in optimizers]
    for steps, norm, color in zip(optimizers, norms, colors, strict=True):
        draw_curve(strip, steps.step, norm, color, "total norm")
    for steps, color, label in thresholds(optimizers, colors):
        draw_threshold(strip, steps, color, label)
    # Without data, the default limits of a logarithmic axis make its ticks warn.
    if not any(np.isfinite(norm).any() for norm in norms):
        strip.set_ylim(0.1, 10.0)
    log_norms(strip.yaxis, 3, between=False)
    draw_edges(strip, optimizers)
    strip.tick_params(axis="x", which="both", length=0, labelbottom=False)
    strip.set_ylabel("total\nnorm", rotation=0, ha="right", va="center", fontsize="small")


def _draw_cells(ax: Axes, cells: HeatCells, relative: bool) -> None:
    left, right = ax.get_xlim()
    values = cells.relative() if relative else cells.norms
    scale, colors = color_scale(values, relative)
    image = ax.imshow(
        np.ma.masked_where(~(values > 0), values),
        norm=scale,
        cmap=colors,
        aspect="auto",
        # Any other interpolation would blend a NaN with its neighbors and blur a single bad step.
        interpolation="nearest",
        extent=(left, right, len(values) - 0.5, -0.5),
    )
    # An inset, because colorbar(ax=...) would shrink the user's axes.
    bar = inset(ax, (1.012, 0.0, 0.014, 1.0))
    ax.figure.colorbar(image, cax=bar, extend="both", extendfrac=0.012)
    unit = "norm / typical norm" if relative else "gradient norm (L2), largest of each cell's steps"
    bar.set_ylabel(unit, fontsize="small", color=ink_of(ax))
    log_norms(bar.yaxis)
    bar.spines[:].set_edgecolor(GREY)


def _mark(ax: Axes, cells: HeatCells) -> None:
    left, right = ax.get_xlim()
    kinds = (
        ("exactly 0", cells.zero, ZERO, 2.0),
        ("NaN or Inf", cells.bad > 0, NONFINITE, 3.0),
    )
    handles = []
    for label, mask, color, above in kinds:
        if mask.any():
            marks = WideMarks(runs_of(mask, left, right), facecolors=color, zorder=above)
            ax.add_collection(marks, autolim=False)
            handles.append(Patch(facecolor=color, edgecolor=GREY, linewidth=0.6, label=label))
    if cells.absent.any():
        handles.append(Patch(color=NO_GRADIENT_GREY, label="no gradient"))
    legend_below(ax, handles=handles)


def color_scale(values: Array, relative: bool) -> tuple[LogNorm, Colormap]:
    """Chooses the color scale.

    Args:
        values: float64: the cells; values that are not above 0 are ignored.
        relative: Whether the values are relative to a typical norm; the scale is then centered
            on 1.

    Returns:
        The scale and its color map.
    """
    some = values[np.isfinite(values) & (values > 0)]
    colors = colormaps[RELATIVE_MAP if relative else NORM_MAP].with_extremes(bad=NO_GRADIENT_GREY)
    if relative:
        factor = float(10 ** np.percentile(np.abs(np.log10(some)), 100 - TAIL)) if len(some) else 1
        factor = min(max(factor, LEAST_FACTOR), LARGEST_FACTOR)
        return LogNorm(1 / factor, factor), colors
    low, high = np.log10(np.percentile(some, [TAIL, 100 - TAIL])) if len(some) else (-1.0, 0.0)
    # At least a decade: a smaller range would show noise as contrast.
    missing = max(0.0, 1.0 - (high - low)) / 2
    return LogNorm(float(10 ** (low - missing)), float(10 ** (high + missing))), colors


@dataclass(frozen=True, slots=True)
class HeatCells:
    """The cells of a heatmap.

    Attributes:
        norms: float64 ``[rows, bins]``: the largest finite norm; NaN if there is none.
        bad: int64 ``[rows, bins]``: how many norms were NaN or Inf.
    """

    norms: Array
    bad: Array

    @property
    def zero(self) -> Array:
        """Bool ``[rows, bins]``: whether all norms were exactly 0."""
        zero: Array = (self.norms == 0) & (self.bad == 0)
        return zero

    @property
    def absent(self) -> Array:
        """Bool ``[rows, bins]``: whether there was no gradient."""
        absent: Array = np.isnan(self.norms) & (self.bad == 0)
        return absent

    def relative(self) -> Array:
        """Divides the norms of each row by the median of its positive ones."""
        relative: Array = self.norms / medians(positive(self.norms).T)[:, None]
        return relative


def _heat_cells(
    blocks: Iterable[ParameterSample], rows: Rows, first: int, last: int, bins: int
) -> HeatCells:
    """Fills the cells from every step from the first to the last; ``bins`` cells per row."""
    # -1 stands for "no norm", because np.maximum would keep a NaN forever. The steps are the first
    # axis, so that a block of steps is contiguous in memory.
    norms = np.full((bins, len(rows)), -1.0)
    bad = np.zeros((bins, len(rows)), np.int64)
    for block in blocks:
        gathered = rows.norms(block["grad_norm"], block.present)
        bin_of = (block.steps - first) * bins // (last - first + 1)
        starts = starts_of(bin_of)
        finite = np.isfinite(gathered)
        # Norms are nearly always finite, and this branch costs as much as the rest.
        if not finite.all():
            there = rows.present(block.present)
            gathered = np.where(finite, gathered, -1.0)
            amiss = (there & ~finite).astype(np.int64)
            bad[bin_of[starts]] += np.add.reduceat(amiss, starts, axis=0)
        highest = np.maximum.reduceat(gathered, starts, axis=0)
        norms[bin_of[starts]] = np.maximum(norms[bin_of[starts]], highest)
    return HeatCells(np.where(norms < 0, np.nan, norms).T, bad.T)


class WideMarks(PolyCollection):
    """Rectangles in data coordinates with a minimum size in pixels.

    Attributes:
        runs: float64 ``[marks, 4]``: left, right, lower and upper edge in data coordinates.
    """

    def __init__(self, runs: Array, **look: Any) -> None:
        self.runs = runs
        super().__init__(_corners(runs), linewidths=0, antialiaseds=False, **look)

    def draw(self, renderer: RendererBase) -> None:
        """Draws each rectangle at least ``LEAST_PIXELS`` wide and high, at the current zoom."""
        axes = self.axes
        # Only when drawing is it known how many steps a pixel covers; a single bad step must show.
        if axes is not None and self.get_visible():
            (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
            x = LEAST_PIXELS * abs(right - left) / max(axes.bbox.width, 1.0)
            y = LEAST_PIXELS * abs(high - low) / max(axes.bbox.height, 1.0)
            wide, high_enough = _at_least(self.runs[:, :2], x), _at_least(self.runs[:, 2:], y)
            self.set_verts(_corners(np.hstack([wide, high_enough])))
        super().draw(renderer)


def runs_of(cells: Array, left: float, right: float) -> Array:
    """Joins adjacent cells of a row into rectangles.

    Args:
        cells: bool ``[rows, bins]``: the cells to mark.
        left: Left edge of the first bin.
        right: Right edge of the last bin.

    Returns:
        float64 ``[marks, 4]`` for :class:`WideMarks`; row ``i`` lies between ``i - 0.5`` and
        ``i + 0.5``.
    """
    # One rectangle per run, not per cell: a parameter that stays NaN has thousands of cells.
    padded = np.pad(cells, ((0, 0), (1, 1))).astype(np.int8)
    change = np.diff(padded, axis=1)
    row, begin = np.nonzero(change == 1)
    end = np.nonzero(change == -1)[1]
    width = (right - left) / cells.shape[1]
    return np.stack([left + begin * width, left + end * width, row - 0.5, row + 0.5], axis=1)


def _at_least(edges: Array, size: float) -> Array:
    middle = edges.mean(axis=1, keepdims=True)
    half = np.maximum(np.abs(edges[:, 1:] - edges[:, :1]), size) / 2
    return np.hstack([middle - half, middle + half])


def _corners(runs: Array) -> Any:
    left, right, low, high = runs.T
    x = np.stack([left, left, right, right], axis=1)
    y = np.stack([low, high, high, low], axis=1)
    return np.stack([x, y], axis=2)

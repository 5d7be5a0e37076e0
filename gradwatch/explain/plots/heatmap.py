"""The gradient norm of every parameter at every step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from gradwatch.explain.plots.blocks import blocks, every_step
from gradwatch.explain.plots.canvas import (
    EMPTY,
    canvas,
    dress,
    inset,
    legend_below,
    log_norms,
    pixel_columns,
    say,
    step_axis,
)
from gradwatch.explain.plots.heat_cells import HeatCells, heat_cells
from gradwatch.explain.plots.heat_scale import color_scale
from gradwatch.explain.plots.norm_curve import (
    draw_curve,
    draw_edges,
    draw_threshold,
    positive,
    thresholds,
)
from gradwatch.explain.plots.norms import bounds, colors_of
from gradwatch.explain.plots.palette import GREY, NO_GRADIENT_GREY, NONFINITE, ZERO
from gradwatch.explain.plots.row_names import name_rows
from gradwatch.explain.plots.rows import Rows, rows_of
from gradwatch.explain.plots.step_tracks import StepTrack, step_tracks
from gradwatch.explain.plots.wide_marks import LEAST_PIXELS, WideMarks, runs_of

if TYPE_CHECKING:
    from gradwatch.explain.report.records import Records

COLUMNS = ("grad_norm", "clip_threshold", "nonfinite_parameters")
ROW_INCHES, LOWEST_INCHES, HIGHEST_INCHES = 0.125, 2.6, 13.0
AROUND_INCHES = 2.0


def draw_heatmap(
    history: Records, ax: Axes | None, relative: bool, start: int | None, stop: int | None
) -> Axes:
    """Draws the plot; see :func:`gradwatch.explain.plots.plot_heatmap`."""
    layout = history.layout
    height = min(max(ROW_INCHES * len(layout.names), LOWEST_INCHES), HIGHEST_INCHES)
    ax = canvas(ax, 10.0, height + AROUND_INCHES)
    what = "Gradient norm over the parameter's typical one" if relative else "Gradient norm"
    dress(ax, f"{what}, by parameter and step", grid=False)
    tracks = step_tracks(history, COLUMNS, start, stop)
    if not tracks or not layout.names:
        return say(ax, EMPTY)
    first, last = bounds(tracks)
    rows = rows_of(layout, max(1, int(ax.get_window_extent().height / LEAST_PIXELS)))
    _frame(ax, rows, tracks, first, last)
    # Only now is it known what room the names leave.
    figure: Any = ax.figure
    figure.draw_without_rendering()
    name_rows(ax, rows.labels)
    bins = min(last - first + 1, pixel_columns(ax))
    read = blocks(history, ["grad_norm"], every_step(first, last))
    cells = heat_cells(read, rows, first, last, bins)
    _fill(ax, cells, relative)
    return ax


def _frame(ax: Axes, rows: Rows, tracks: list[StepTrack], first: int, last: int) -> None:
    step_axis(ax, first, last)
    name_rows(ax, rows.labels)
    ax.spines[:].set_visible(False)
    _strip(ax, tracks)


def _strip(ax: Axes, tracks: list[StepTrack]) -> None:
    """Draws the total norm above the picture."""
    inches = ax.get_window_extent().height / ax.figure.dpi
    strip = inset(ax, (0.0, 1.0 + 0.06 / inches, 1.0, max(0.12, 0.7 / inches)), sharex=ax)
    dress(strip)
    strip.set_yscale("log")
    columns = pixel_columns(ax)
    colors = colors_of(tracks)
    for track, color in zip(tracks, colors, strict=True):
        draw_curve(strip, track.step, positive(track["grad_norm"]), columns, color, "total norm")
    for track, color, label in thresholds(tracks, colors):
        draw_threshold(strip, track, columns, color, label)
    if not any(np.isfinite(positive(track["grad_norm"])).any() for track in tracks):
        strip.set_ylim(0.1, 10.0)
    log_norms(strip.yaxis, 3, between=False)
    draw_edges(strip, tracks)
    strip.tick_params(axis="x", which="both", length=0, labelbottom=False)
    strip.set_ylabel("total\nnorm", rotation=0, ha="right", va="center", fontsize="small")


def _fill(ax: Axes, cells: HeatCells, relative: bool) -> None:
    left, right = ax.get_xlim()
    values = cells.relative() if relative else cells.norms
    scale, colors = color_scale(values, relative)
    image = ax.imshow(
        np.ma.masked_where(~(values > 0), values),
        norm=scale,
        cmap=colors,
        aspect="auto",
        interpolation="nearest",
        extent=(left, right, len(values) - 0.5, -0.5),
    )
    bar = inset(ax, (1.012, 0.0, 0.014, 1.0))
    ax.figure.colorbar(image, cax=bar, extend="both", extendfrac=0.012)
    unit = "norm / typical norm" if relative else "gradient norm (L2), largest of each cell's steps"
    bar.set_ylabel(unit, fontsize="small", color=ax.xaxis.label.get_color())
    log_norms(bar.yaxis)
    bar.spines[:].set_edgecolor(GREY)
    _mark(ax, cells)


def _mark(ax: Axes, cells: HeatCells) -> None:
    left, right = ax.get_xlim()
    kinds = (
        ("exactly 0", cells.zero, ZERO, 2.0),
        ("NaN or Inf", cells.bad > 0, NONFINITE, 3.0),
    )
    handles = []
    for label, mask, color, above in kinds:
        if mask.any():
            runs = runs_of(mask, left, right)
            ax.add_collection(
                WideMarks(runs, facecolors=color, zorder=above, label=label), autolim=False
            )
            handles.append(Patch(facecolor=color, edgecolor=GREY, linewidth=0.6, label=label))
    if cells.absent.any():
        handles.append(Patch(color=NO_GRADIENT_GREY, label="no gradient"))
    legend_below(ax, handles=handles)

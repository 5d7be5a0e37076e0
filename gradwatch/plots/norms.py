"""Plot of the total gradient norm by step, with the clip threshold and the events above it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from gradwatch.plots.canvas import (
    AFTER,
    BEFORE,
    EMPTY,
    GREY,
    LANES,
    NONFINITE,
    OPTIMIZERS,
    PLAIN,
    SMALL,
    THRESHOLD,
    canvas,
    dress,
    inset,
    legend_below,
    log_norms,
    pixel_columns,
    say,
    step_axis,
)
from gradwatch.plots.data import column_of, extremes, first_per_column
from gradwatch.record.columns import Array, Source, Span, events_frame
from gradwatch.record.wording import counted
from gradwatch.report.run_data import OptimizerArrays, first_and_last, read_steps

CURVES = ("grad_norm", "grad_norm_clipped", "clip_threshold")
COLUMNS = (*CURVES, "clipped", "nonfinite_parameters")

MEDIANS = 150
"""Number of points of the running median over the whole width."""

EDGE = 0.975
LANE_INCHES = 0.17


def draw_norms(source: Source, ax: Axes | None, span: Span) -> Axes:
    """Draws the plot; see :meth:`gradwatch.History.plot_norms`."""
    optimizers = read_steps(source, COLUMNS, span)
    ax = canvas(ax, 10.0, 5.0)
    dress(ax, "Gradient norm by step")
    ax.set_ylabel("total gradient norm (L2)")
    if not optimizers:
        ax.set_xlabel("optimizer step")
        return say(ax, EMPTY)
    step_axis(ax, *first_and_last(optimizers))
    ax.set_yscale("log")
    colors = colors_of(optimizers)
    for steps, color in zip(optimizers, colors, strict=True):
        _draw_norms_of(ax, steps, color, len(optimizers) > 1)
    for steps, color, label in thresholds(optimizers, colors):
        draw_threshold(ax, steps, color, label)
    _limit(ax, optimizers)
    log_norms(ax.yaxis)
    draw_edges(ax, optimizers)
    # Last, because the height of the lanes depends on the final height of the axes.
    _draw_lanes(ax, _lanes(source, optimizers))
    legend_below(ax)
    return ax


def colors_of(optimizers: Sequence[OptimizerArrays]) -> list[str]:
    """Chooses the color of each optimizer's norms."""
    if len(optimizers) == 1:
        return [BEFORE]
    return [OPTIMIZERS[number % len(OPTIMIZERS)] for number in range(len(optimizers))]


def positive(norms: Array) -> Array:
    """Keeps what a logarithmic axis can show, and replaces the rest by NaN."""
    return np.where(np.isfinite(norms) & (norms > 0), norms, np.nan)


def _draw_norms_of(ax: Axes, steps: OptimizerArrays, color: str, several: bool) -> None:
    name = f"{steps.optimizer}: " if several else ""
    clipped = steps["clipped"] == 1
    label = f"{name}before the clip" if clipped.any() else f"{name}gradient norm"
    draw_curve(ax, steps.step, positive(steps["grad_norm"]), color, label)
    if clipped.any():
        look = (color, f"{name}after the clip", ":") if several else (AFTER, "after the clip", "-")
        norms = positive(steps["grad_norm_clipped"])
        # At other steps it equals the norm before the clip, and would hide that curve.
        norms[~clipped] = np.nan
        draw_curve(ax, steps.step, norms, *look)


def draw_curve(
    ax: Axes, step: Array, norms: Array, color: str, label: str, dashes: str = "-"
) -> None:
    """Draws a curve; a long one as its extremes, faintly, and the running median.

    Args:
        ax: Its x axis must be set up for the steps already.
        step: int64 ``[steps]``, ascending.
        norms: float64 ``[steps]``, NaN for a gap.
        color: Any color of matplotlib.
        label: Text for the legend.
        dashes: Line style of matplotlib.
    """
    shown = extremes(step, norms, pixel_columns(ax))
    look: dict[str, Any] = {"color": color, "linestyle": dashes, "solid_joinstyle": "bevel"}
    # Few points get markers: a curve of a single point has no line.
    look["marker"] = "." if np.count_nonzero(np.isfinite(norms)) <= MEDIANS else ""
    if len(shown) == len(step):
        ax.plot(step, norms, linewidth=1.1, label=label, **look)
        return
    ax.plot(step[shown], norms[shown], linewidth=0.7, alpha=0.45, **look)
    ax.plot(
        *_running_median(step, norms), linewidth=1.6, label=f"{label} (median, extremes)", **look
    )


def _running_median(step: Array, values: Array) -> tuple[Array, Array]:
    """Returns the middle step and the median of each window of steps, ignoring NaN."""
    import pandas as pd

    window = column_of(step, MEDIANS)
    grouped = pd.DataFrame({"step": step, "value": values}).groupby(window)
    return grouped["step"].mean().to_numpy(), grouped["value"].median().to_numpy()


def thresholds(
    optimizers: Sequence[OptimizerArrays], colors: Sequence[str]
) -> Iterator[tuple[OptimizerArrays, str, str]]:
    """Chooses the threshold lines to draw: only one if all optimizers share a constant threshold.

    Yields:
        The steps of an optimizer, and the color and label of its threshold.
    """
    limits = [positive(steps["clip_threshold"]) for steps in optimizers]
    distinct = np.unique(np.concatenate(limits))
    if len(optimizers) == 1 or np.isfinite(distinct).sum() <= 1:
        # Draw the shared threshold once, for the optimizer that has it at the most steps.
        longest = max(range(len(optimizers)), key=lambda n: np.isfinite(limits[n]).sum())
        yield optimizers[longest], THRESHOLD, "clip threshold"
        return
    for steps, color in zip(optimizers, colors, strict=True):
        yield steps, color, f"{steps.optimizer}: clip threshold"


def draw_threshold(ax: Axes, steps: OptimizerArrays, color: str, label: str) -> None:
    """Draws the clip threshold, if there was one."""
    threshold = positive(steps["clip_threshold"])
    if not np.isfinite(threshold).any():
        return
    look: dict[str, Any] = {"color": color, "linestyle": (0, (5, 2)), "linewidth": 1.3}
    # A line through a single point would be invisible.
    if len(steps) == 1:
        ax.axhline(float(threshold[0]), label=label, **look)
        return
    shown = extremes(steps.step, threshold, pixel_columns(ax))
    ax.plot(steps.step[shown], threshold[shown], label=label, **look)


def _limit(ax: Axes, optimizers: Sequence[OptimizerArrays]) -> None:
    """Leaves room at both edges, and shows at least a decade, so that noise does not look large."""
    values = np.concatenate([positive(steps[name]) for steps in optimizers for name in CURVES])
    values = values[np.isfinite(values)]
    if not len(values):
        ax.set_ylim(0.1, 10.0)
        return
    low, high = np.log10(values.min()), np.log10(values.max())
    missing = max(0.0, 1.0 - (high - low)) / 2
    margin = 0.08 * max(1.0, high - low)
    ax.set_ylim(10 ** (low - missing - margin), 10 ** (high + missing + margin))


def draw_edges(ax: Axes, optimizers: Sequence[OptimizerArrays]) -> None:
    """Marks steps with a NaN or an Inf at the upper edge, and norms of exactly 0 at the lower."""
    bad = np.concatenate([steps.step[steps.nonfinite] for steps in optimizers])
    zero = np.concatenate([steps.step[steps["grad_norm"] == 0] for steps in optimizers])
    _mark(ax, np.unique(bad), EDGE, "v", NONFINITE, "NaN or Inf")
    _mark(ax, np.unique(zero), 1 - EDGE, "^", GREY, "exactly 0")


def _mark(ax: Axes, steps: Array, height: float, marker: str, color: str, label: str) -> None:
    if not len(steps):
        return
    shown = first_per_column(steps, pixel_columns(ax))
    ax.plot(
        shown,
        np.full(len(shown), height),
        marker,
        color=color,
        markersize=7,
        markeredgewidth=0,
        # x is a step, y a share of the height: marks stay at the edge when the user zooms.
        transform=ax.get_xaxis_transform(),
        label=f"{label} ({counted(len(steps), 'step')})",
        zorder=5,
    )


def _lanes(source: Source, optimizers: Sequence[OptimizerArrays]) -> dict[str, Array]:
    """Collects the steps of each kind of event."""
    first, last = first_and_last(optimizers)
    events = events_frame(source.events())
    inside = events[(events["step"] >= first) & (events["step"] <= last)]
    lanes: dict[str, Array] = {
        str(kind): group["step"].to_numpy()
        for kind, group in inside.groupby("kind")
        # Skipped steps are taken from the steps, which include those that a scaler skipped.
        if kind != "skipped"
    }
    left_out = np.concatenate([steps.step[~steps.applied] for steps in optimizers])
    return {**lanes, "not applied": left_out}


def _draw_lanes(ax: Axes, lanes: dict[str, Array]) -> None:
    """Draws a lane of marks for each kind of event above the plot, on the same x axis."""
    order = [*LANES, *lanes]
    kinds = sorted((kind for kind in lanes if len(lanes[kind])), key=order.index)
    if not kinds:
        return
    # Lane height in inches: as a share of the height, the lanes of a low plot would overlap.
    height = LANE_INCHES * ax.figure.dpi / max(1.0, ax.get_window_extent().height)
    lane = inset(ax, (0.0, 1.02, 1.0, height * len(kinds)), sharex=ax)
    lane.set_facecolor("none")
    look: dict[str, Any] = {"markersize": 8.0, "markeredgewidth": 2.2}
    for row, kind in enumerate(kinds):
        steps = first_per_column(np.unique(lanes[kind]), pixel_columns(ax))
        lane.axhline(row, color=GREY, alpha=0.25, linewidth=0.6, zorder=0)
        color = LANES.get(kind, GREY)
        lane.plot(steps, np.full(len(steps), row), "|", label=kind, color=color, **look)
    labels = [f"{kind.replace('_', ' ')} ({len(lanes[kind]):,})" for kind in kinds]
    lane.set_ylim(len(kinds) - 0.4, -0.6)
    lane.set_yticks(range(len(kinds)), labels, fontsize=SMALL, **PLAIN)
    lane.tick_params(which="both", length=0, labelbottom=False)
    lane.spines[:].set_visible(False)

"""How often and how hard the clip acts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes

from gradwatch.plots.canvas import (
    AFTER,
    EMPTY,
    GREY,
    canvas,
    dress,
    inset,
    legend_below,
    log_norms,
    pixel_columns,
    say,
    step_axis,
    tint,
)
from gradwatch.plots.data import Array, StepTrack, column_of, step_tracks
from gradwatch.plots.norms import bounds, colors_of, draw_curve, positive, thresholds
from gradwatch.report.run_data import counted

if TYPE_CHECKING:
    from gradwatch.report.run_data import Records


COLUMNS = (
    "grad_norm",
    "clip_coef",
    "clip_threshold",
    "clipped",
    "outcome",
    "nonfinite_parameters",
)
WINDOWS, LEAST_WINDOW = 60, 10
BINS = 60
WIDE_STEPS, WIDE_SPREAD = 4.5, 2.0
"""Inches from which on there is room for two columns of legend, and for numbers between powers."""

QUANTILES = (1.0, 50.0, 99.0)
MIDDLE = 50.0
ROOM = 0.14
"""Share of the width that the name of a quantile takes."""


def draw_clipping(history: Records, ax: Axes | None, start: int | None, stop: int | None) -> Axes:
    """Draws the plot; see :func:`gradwatch.plots.plot_clipping`."""
    tracks = step_tracks(history, COLUMNS, start, stop)
    ax = canvas(ax, 10.0, 4.4)
    dress(ax, "Clipping", grid=False)
    if not tracks:
        return say(ax, EMPTY)
    ax.set_title(f"Clipping: {_summary(tracks)}", loc="left", fontsize="medium", fontweight="bold")
    gap = 0.75 / _inches(ax)
    by_step = inset(ax, (0.0, 0.0, 0.62 - gap / 2, 1.0))
    spread = inset(ax, (0.62 + gap / 2, 0.0, 0.38 - gap / 2, 1.0))
    ax.set_axis_off()
    step_axis(by_step, *bounds(tracks))
    colors = colors_of(tracks)
    for track, color in zip(tracks, colors, strict=True):
        name = f"{track.optimizer}: " if len(tracks) > 1 else ""
        _draw_steps(by_step, track, name, color)
        _draw_spread(spread, track, name, color)
    for track, color, label in thresholds(tracks, colors):
        _draw_threshold(spread, positive(track["clip_threshold"]), color, label)
    if len(tracks) == 1:  # of several the marks would lie on each other
        _mark_quantiles(spread, tracks[0])
    _finish_steps(by_step)
    _finish_spread(spread)
    return ax


def clip_rate(track: StepTrack) -> tuple[Array, Array]:
    """Takes the share of applied steps that were clipped, window by window.

    Args:
        track: The steps.

    Returns:
        The edges of the windows, int64 ``[windows + 1]``, and the shares, float64 ``[windows]``;
        NaN where no step was applied.
    """
    step = track.step
    windows = int(np.clip(len(step) // LEAST_WINDOW, 1, WINDOWS))
    window = column_of(step, windows)
    applied = np.bincount(window, track["applied"], windows)
    clipped = np.bincount(window, track["clipped"] & track["applied"], windows)
    edges = step[0] + np.arange(windows + 1) * (step[-1] + 1 - step[0]) // windows
    shares = np.full(windows, np.nan)
    return edges, np.divide(clipped, applied, where=applied > 0, out=shares)


def _summary(tracks: list[StepTrack]) -> str:
    clipped = sum(int((track["clipped"] & track["applied"]).sum()) for track in tracks)
    applied = sum(int(track["applied"].sum()) for track in tracks)
    if not clipped:
        return f"none of {counted(applied, 'applied step')}"
    return f"{100 * clipped / applied:.3g} % of {counted(applied, 'applied step')}"


def _draw_steps(ax: Axes, track: StepTrack, name: str, color: str) -> None:
    edges, shares = clip_rate(track)
    label = f"{name}clip rate (share of the steps around)"
    ax.stairs(shares, edges - 0.5, fill=True, color=color, alpha=tint(ax, 0.22), label=label)
    coef = np.where(np.isfinite(track["clip_coef"]), track["clip_coef"], np.nan)
    look = AFTER if not name else color
    draw_curve(ax, track.step, coef, pixel_columns(ax), look, f"{name}clip coefficient")


def _finish_steps(ax: Axes) -> None:
    dress(ax)
    low, high = ax.get_ylim()
    ax.set_ylim(min(0.0, low), max(1.04, high))
    ax.set_ylabel("factor, share")
    legend_below(ax, columns=2 if _inches(ax) >= WIDE_STEPS else 1)


def _inches(ax: Axes) -> float:
    return float(ax.get_window_extent().width) / ax.figure.dpi


def _draw_spread(ax: Axes, track: StepTrack, name: str, color: str) -> None:
    norms = positive(track["grad_norm"])
    norms = norms[np.isfinite(norms)]
    if len(norms):
        edges = _edges(norms, positive(track["clip_threshold"]))
        counts = np.histogram(norms, edges)[0] / len(norms)
        look: dict[str, Any] = {"fill": True, "color": color, "alpha": tint(ax, 0.55)}
        ax.stairs(100 * counts, edges, label=f"{name}norms before the clip", **look)


def _mark_quantiles(ax: Axes, track: StepTrack) -> None:
    """Marks the median, and the others where there is room beside it."""
    norms = positive(track["grad_norm"])
    norms = norms[np.isfinite(norms)]
    if not len(norms):
        return
    width = np.ptp(np.log10(_edges(norms, positive(track["clip_threshold"]))))
    middle = float(np.median(norms))
    for quantile, place in zip(QUANTILES, np.percentile(norms, QUANTILES), strict=True):
        if quantile != MIDDLE and abs(np.log10(place / middle)) < ROOM * width:
            continue
        ax.axvline(place, color=GREY, linewidth=0.8, linestyle=":")
        ax.annotate(
            f"{quantile:.0f} %",
            (place, 1.0),
            xycoords=ax.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=7,
            color=GREY,
        )


def _edges(norms: Array, threshold: Array) -> Array:
    """Takes bins of equal width on the logarithmic axis, from the least number to the largest."""
    ends = np.log10(np.concatenate([norms, threshold[np.isfinite(threshold)]]))
    low, high = float(ends.min()), float(ends.max())
    missing = max(0.02, (0.5 - (high - low)) / 2)
    edges: Array = np.logspace(low - missing, high + missing, BINS + 1)
    return edges


def _draw_threshold(ax: Axes, threshold: Array, color: str, label: str) -> None:
    threshold = threshold[np.isfinite(threshold)]
    if not len(threshold):
        return
    low, middle, high = np.percentile(threshold, [5, 50, 95])
    if high > low:
        ax.axvspan(low, high, color=color, alpha=tint(ax, 0.15), linewidth=0)
        label += " (median, 5 to 95 %)"
    ax.axvline(middle, color=color, linestyle=(0, (5, 2)), linewidth=1.3, label=label)


def _finish_spread(ax: Axes) -> None:
    dress(ax)
    if ax.get_legend_handles_labels()[0]:
        ax.set_xscale("log")
        log_norms(ax.xaxis, 5, between=_inches(ax) >= WIDE_SPREAD)
    else:
        say(ax, "no finite norm")
    ax.set_xlabel("total gradient norm (L2)")
    ax.set_ylabel("steps (%)")
    legend_below(ax, columns=1)

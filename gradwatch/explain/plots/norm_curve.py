"""A norm by step: its curve, its threshold, and the steps that no logarithmic axis can show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from gradwatch.explain.plots.canvas import pixel_columns
from gradwatch.explain.plots.palette import GREY, NONFINITE, THRESHOLD
from gradwatch.explain.plots.step_tracks import StepTrack
from gradwatch.explain.plots.thinning import Array, column_of, extremes, first_per_column

MEDIANS = 150
"""Points of a running median over the whole width."""

EDGE = 0.975


def positive(norms: Array) -> Array:
    """Keeps what a logarithmic axis can show; NaN elsewhere."""
    return np.where(np.isfinite(norms) & (norms > 0), norms, np.nan)


def draw_curve(
    ax: Axes, step: Array, norms: Array, columns: int, color: str, label: str, dashes: str = "-"
) -> None:
    """Draws a curve; a long one as its extremes, faintly, and the running median.

    Args:
        ax: The axes.
        step: int64 ``[steps]``, rising.
        norms: float64 ``[steps]``, NaN for a gap.
        columns: Columns of pixels.
        color: Of the line.
        label: For the legend.
        dashes: Its style.
    """
    shown = extremes(step, norms, columns)
    long = len(shown) < len(step)
    look: dict[str, Any] = {"color": color, "linestyle": dashes, "solid_joinstyle": "bevel"}
    # A curve of a single point has no line.
    marker = "." if np.count_nonzero(np.isfinite(norms)) <= MEDIANS else ""
    look["marker"] = marker
    if not long:
        ax.plot(step, norms, linewidth=1.1, label=label, **look)
        return
    ax.plot(step[shown], norms[shown], linewidth=0.7, alpha=0.45, **look)
    middle, medians = running_median(step, norms)
    ax.plot(middle, medians, linewidth=1.6, label=f"{label} (median, extremes)", **look)


def running_median(step: Array, values: Array) -> tuple[Array, Array]:
    """Takes the median of windows that part the steps.

    Args:
        step: int64 ``[steps]``, rising.
        values: float64 ``[steps]``; NaN counts for nothing.

    Returns:
        The middle step and the median of each window.
    """
    import pandas as pd

    window = column_of(step, MEDIANS)
    grouped = pd.DataFrame({"step": step, "value": values}).groupby(window)
    return grouped["step"].mean().to_numpy(), grouped["value"].median().to_numpy()


def thresholds(
    tracks: Sequence[StepTrack], colors: Sequence[str]
) -> Iterator[tuple[StepTrack, str, str]]:
    """Chooses what to draw of the clip's threshold: one line where all optimizers share it.

    Args:
        tracks: The steps of each optimizer.
        colors: The colour of each.

    Yields:
        Whose threshold, its colour and its name.
    """
    limits = [positive(track["clip_threshold"]) for track in tracks]
    distinct = np.unique(np.concatenate(limits))
    if len(tracks) == 1 or np.isfinite(distinct).sum() <= 1:
        longest = max(range(len(tracks)), key=lambda n: np.isfinite(limits[n]).sum())
        yield tracks[longest], THRESHOLD, "clip threshold"
        return
    for track, color in zip(tracks, colors, strict=True):
        yield track, color, f"{track.optimizer}: clip threshold"


def draw_threshold(ax: Axes, track: StepTrack, columns: int, color: str, label: str) -> None:
    """Draws the threshold of the clip, if there was any.

    Args:
        ax: The axes.
        track: The steps.
        columns: Columns of pixels.
        color: Of the line.
        label: For the legend.
    """
    threshold = positive(track["clip_threshold"])
    if not np.isfinite(threshold).any():
        return
    shown = extremes(track.step, threshold, columns)
    look: dict[str, Any] = {"color": color, "linestyle": (0, (5, 2)), "linewidth": 1.3}
    if len(track.step) == 1:
        ax.axhline(float(threshold[0]), label=label, **look)
        return
    ax.plot(track.step[shown], threshold[shown], label=label, **look)


def draw_edges(ax: Axes, tracks: Sequence[StepTrack]) -> None:
    """Marks steps with a NaN or an Inf at the upper edge, and norms of exactly 0 at the lower one.

    Args:
        ax: The axes.
        tracks: The steps of each optimizer.
    """
    bad = np.unique(np.concatenate([track.step[track.bad] for track in tracks]))
    zero = np.unique(np.concatenate([track.step[track["grad_norm"] == 0] for track in tracks]))
    _mark(ax, bad, EDGE, "v", NONFINITE, "NaN or Inf")
    _mark(ax, zero, 1 - EDGE, "^", GREY, "exactly 0")


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
        transform=ax.get_xaxis_transform(),
        label=f"{label} ({len(steps):,} step{'s' * (len(steps) > 1)})",
        zorder=5,
    )

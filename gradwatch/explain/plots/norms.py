"""The total gradient norm by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes

from gradwatch.explain.plots.canvas import (
    EMPTY,
    canvas,
    dress,
    legend_below,
    log_norms,
    pixel_columns,
    say,
    step_axis,
)
from gradwatch.explain.plots.lanes import draw_lanes
from gradwatch.explain.plots.norm_curve import (
    draw_curve,
    draw_edges,
    draw_threshold,
    positive,
    thresholds,
)
from gradwatch.explain.plots.palette import AFTER, BEFORE, OPTIMIZERS
from gradwatch.explain.plots.step_tracks import StepTrack, step_tracks
from gradwatch.explain.plots.thinning import Array

if TYPE_CHECKING:
    from gradwatch.explain.report.records import Records

COLUMNS = (
    "grad_norm",
    "grad_norm_clipped",
    "clip_threshold",
    "clipped",
    "outcome",
    "nonfinite_parameters",
)


def draw_norms(history: Records, ax: Axes | None, start: int | None, stop: int | None) -> Axes:
    """Draws the plot; see :func:`gradwatch.explain.plots.plot_norms`."""
    tracks = step_tracks(history, COLUMNS, start, stop)
    ax = canvas(ax, 10.0, 5.0)
    dress(ax, "Gradient norm by step")
    ax.set_ylabel("total gradient norm (L2)")
    if not tracks:
        ax.set_xlabel("optimizer step")
        return say(ax, EMPTY)
    first, last = bounds(tracks)
    step_axis(ax, first, last)
    ax.set_yscale("log")
    colors = colors_of(tracks)
    for track, color in zip(tracks, colors, strict=True):
        _draw_track(ax, track, color, len(tracks) > 1)
    for track, color, label in thresholds(tracks, colors):
        draw_threshold(ax, track, pixel_columns(ax), color, label)
    _limit(ax, tracks)
    log_norms(ax.yaxis)
    draw_edges(ax, tracks)
    draw_lanes(ax, _lanes(history, tracks, first, last))
    legend_below(ax)
    return ax


def bounds(tracks: Sequence[StepTrack]) -> tuple[int, int]:
    """Returns the first and the last step of all optimizers."""
    first = min(int(track.step.min()) for track in tracks)
    return first, max(int(track.step.max()) for track in tracks)


def colors_of(tracks: Sequence[StepTrack]) -> list[str]:
    """Chooses the colour of each optimizer's norms."""
    if len(tracks) == 1:
        return [BEFORE]
    return [OPTIMIZERS[number % len(OPTIMIZERS)] for number in range(len(tracks))]


def _draw_track(ax: Axes, track: StepTrack, color: str, several: bool) -> None:
    columns = pixel_columns(ax)
    name = f"{track.optimizer}: " if several else ""
    clipped = bool(track["clipped"].any())
    label = f"{name}before the clip" if clipped else f"{name}gradient norm"
    draw_curve(ax, track.step, positive(track["grad_norm"]), columns, color, label)
    if clipped:
        after = AFTER if not several else color
        dashes = "-" if not several else ":"
        norms = positive(track["grad_norm_clipped"])
        # Elsewhere it is the norm before the clip, and would hide it.
        norms[~track["clipped"]] = np.nan
        draw_curve(ax, track.step, norms, columns, after, f"{name}after the clip", dashes)


def _limit(ax: Axes, tracks: Sequence[StepTrack]) -> None:
    """Leaves room at both edges, and keeps a steady norm from filling the height with its noise."""
    drawn = [positive(track[name]) for track in tracks for name in COLUMNS[:3]]
    values = np.concatenate([array[np.isfinite(array)] for array in drawn])
    if not len(values):
        ax.set_ylim(0.1, 10.0)
        return
    low, high = np.log10(values.min()), np.log10(values.max())
    missing = max(0.0, 1.0 - (high - low)) / 2
    margin = 0.08 * max(1.0, high - low)
    ax.set_ylim(10 ** (low - missing - margin), 10 ** (high + missing + margin))


def _lanes(
    history: Records, tracks: Sequence[StepTrack], first: int, last: int
) -> dict[str, Array]:
    """Gathers the steps of each kind of event; those left out are known from the steps."""
    events = history.events()
    inside = events[(events["step"] >= first) & (events["step"] <= last)]
    lanes: dict[str, Array] = {
        str(kind): np.sort(group["step"].to_numpy())
        for kind, group in inside.groupby("kind")
        if kind != "skipped"
    }
    left_out = np.concatenate([track.step[~track["applied"]] for track in tracks])
    return {**lanes, "not applied": np.sort(left_out)}

"""The total gradient norm by step, with its threshold and the events above it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

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
from gradwatch.plots.data import (
    Array,
    StepTrack,
    column_of,
    extremes,
    first_per_column,
    step_tracks,
)

if TYPE_CHECKING:
    from gradwatch.report.run_data import Records


LANE_INCHES = 0.17


def draw_lanes(ax: Axes, lanes: Mapping[str, Array]) -> Axes | None:
    """Draws the lanes.

    Args:
        ax: The plot, whose axis of the steps they share.
        lanes: By kind the steps, rising.

    Returns:
        Their axes; None where there is no event.
    """
    order = [*LANES, *lanes]
    kinds = sorted((kind for kind in lanes if len(lanes[kind])), key=order.index)
    if not kinds:
        return None
    height = LANE_INCHES * ax.figure.dpi / max(1.0, ax.get_window_extent().height)
    lane = inset(ax, (0.0, 1.02, 1.0, height * len(kinds)), sharex=ax)
    lane.set_facecolor("none")
    for row, kind in enumerate(kinds):
        steps = first_per_column(np.unique(lanes[kind]), pixel_columns(ax))
        lane.axhline(row, color=GREY, alpha=0.25, linewidth=0.6, zorder=0)
        look: dict[str, Any] = {
            "color": LANES.get(kind, GREY),
            "markersize": 8.0,
            "markeredgewidth": 2.2,
        }
        lane.plot(steps, np.full(len(steps), row), "|", label=kind, **look)
    _label(lane, [f"{kind.replace('_', ' ')} ({len(lanes[kind]):,})" for kind in kinds])
    return lane


def _label(lane: Axes, labels: list[str]) -> None:
    lane.set_ylim(len(labels) - 0.4, -0.6)
    lane.set_yticks(range(len(labels)), labels, fontsize=SMALL, **PLAIN)
    lane.tick_params(which="both", length=0, labelbottom=False)
    lane.spines[:].set_visible(False)


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


COLUMNS = (
    "grad_norm",
    "grad_norm_clipped",
    "clip_threshold",
    "clipped",
    "outcome",
    "nonfinite_parameters",
)


def draw_norms(history: Records, ax: Axes | None, start: int | None, stop: int | None) -> Axes:
    """Draws the plot; see :func:`gradwatch.plots.plot_norms`."""
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

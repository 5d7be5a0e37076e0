"""Clipping: a clip that acts on most steps, or on none, and the limit that would suit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradwatch.report.finding import Evidence, Finding, Severity
from gradwatch.report.run_data import Array, OptimizerArrays, RunData
from gradwatch.report.thresholds import Thresholds

_FEWEST = 100
_SAME_NORM = 0.01

OFTEN_WHY = (
    "The clip, not the gradient, sets the size of most updates: the learning rate and the limit "
    "are one number then, and outliers are told from the rest no more."
)
NEVER_WHY = "A limit that far away protects from nothing: a step of twice the usual norm passes."
ADVICE = (
    "A limit between {low:.3g} and {high:.3g} would clip 1 to 5 % of these steps; "
    'watch(..., clip="auto") finds one, and follows the norms.'
)
OF_ELEMENTS = "The limit is no global norm, so that no other one can be told from these norms."


def clipping(run: RunData, limits: Thresholds) -> Iterator[Finding]:
    """Finds a clip that is nearly always, or never, at work.

    Policies without a limit for the whole gradient act on most steps by design, and are left out.

    Args:
        run: The run.
        limits: ``clip_steps``, ``clip_often`` and ``clip_far``.
    """
    for track in run.tracks:
        sound = track.applied & np.isfinite(track["grad_norm"])
        rows = np.flatnonzero(sound & np.isfinite(track["clip_threshold"]))[-limits.clip_steps :]
        if len(rows) >= _FEWEST:
            yield from _judge(track, rows, limits)


def _judge(track: OptimizerArrays, rows: Array, limits: Thresholds) -> Iterator[Finding]:
    norms, limit = track["grad_norm"][rows], float(track["clip_threshold"][rows[-1]])
    rate = float(track["clipped"][rows].mean())
    if rate > limits.clip_often:
        title = (
            f"{rate:.0%} of the last {len(rows):,} steps were clipped, at a limit of {limit:.3g}."
        )
        yield _finding("clip_always", "warning", title, OFTEN_WHY, track, rows)
    elif rate == 0 and limit > limits.clip_far * norms.max() > 0:
        title = (
            f"None of the last {len(rows):,} steps was clipped: the limit is {limit:.3g}, the "
            f"largest norm {norms.max():.3g}."
        )
        yield _finding("clip_never", "note", title, NEVER_WHY, track, rows)


def _finding(
    kind: str, severity: Severity, title: str, why: str, track: OptimizerArrays, rows: Array
) -> Finding:
    norms = track["grad_norm"][rows]
    low, high = (float(one) for one in np.quantile(norms, (0.95, 0.99)))
    numbers = {
        "rate": float(track["clipped"][rows].mean()),
        "limit": float(track["clip_threshold"][rows[-1]]),
        "clips_5_percent": low,
        "clips_1_percent": high,
    }
    by_norm = _is_norm(track, rows)
    if not by_norm:
        del numbers["clips_5_percent"], numbers["clips_1_percent"]
    seen = Evidence(
        (int(track.step[rows[0]]), int(track.step[rows[-1]])), (), numbers, track.optimizer
    )
    advice = ADVICE.format(low=low, high=high) if by_norm else OF_ELEMENTS
    return Finding(kind, severity, title, seen, why, advice)


def _is_norm(track: OptimizerArrays, rows: Array) -> bool:
    """Tells whether clipped norms end at the limit, as they do unless it is one for elements."""
    clipped = rows[track["clipped"][rows].astype(bool)]
    if not len(clipped):
        return True
    ends = track["grad_norm_clipped"][clipped] / track["clip_threshold"][clipped]
    return bool(abs(np.median(ends) - 1) < _SAME_NORM)

"""Exploding: norms far above those at the start, or above the limit that the user set."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradwatch.report.finding import Evidence, Finding
from gradwatch.report.run_data import Array, OptimizerArrays, RunData, counted, first_steps
from gradwatch.report.thresholds import Thresholds

_BLOCK = 5
_START = 10

WHY = (
    "Updates follow the gradient: they throw the weights to where the loss is flat or not finite. "
    "What was learnt is lost, with Adam as well."
)
ADVICE = (
    "Lower the learning rate ({lr}), by ten to begin with; warm it up over the first hundreds of "
    'steps; clip with watch(..., clip="auto"). If it starts at step 1 with any rate, look at the '
    "initial weights and at layers without normalisation, and let "
    "gradwatch.check_gradients(function) check each autograd.Function of your own."
)
OVER_LIMIT = (
    "The norm was above exploding_norm in {count}, from step {step} on; the largest was "
    "{value:.4g}."
)


def exploding(run: RunData, limits: Thresholds) -> Iterator[Finding]:
    """Finds norms that have grown out of all proportion.

    Args:
        run: The run.
        limits: ``exploding``.
    """
    for track in run.tracks:
        start, peak, place = growth(track)
        if peak > limits.exploding * start > 0:
            yield _grown(track, start, peak, place, limits)
        else:
            yield from _over_limit(run, track)


def growth(track: OptimizerArrays) -> tuple[float, float, int]:
    """Compares the norms of a run with those at its start.

    Medians of five steps are compared, so that a spike is none; only the last norm before a NaN
    counts alone, for there is nothing after it.

    Args:
        track: The steps.

    Returns:
        The usual norm at the start, the largest later on, and the row of the latter.
    """
    rows = np.flatnonzero(np.isfinite(track["grad_norm"]))
    norms = track["grad_norm"][rows].astype(float)
    if not len(norms):
        return 0.0, 0.0, 0
    start = float(min(norms[0], np.median(norms[:_START])))
    blocks = _block_medians(norms)
    peak, place = 0.0, 0
    if len(blocks):
        peak, place = float(blocks.max()), int(rows[blocks.argmax() * _BLOCK])
    if rows[-1] + 1 < len(track) and norms[-1] > peak:
        peak, place = float(norms[-1]), int(rows[-1])
    return start, peak, place


def _block_medians(norms: Array) -> Array:
    whole = len(norms) // _BLOCK * _BLOCK
    return np.median(norms[:whole].reshape(-1, _BLOCK), axis=1)


def _grown(
    track: OptimizerArrays, start: float, peak: float, place: int, limits: Thresholds
) -> Finding:
    step = int(track.step[place])
    numbers = {"start": start, "largest": peak, "growth": peak / start, "limit": limits.exploding}
    title = (
        f"The gradient norm grew {peak / start:,.3g} times, from {start:.3g} at the start to "
        f"{peak:.3g} around step {step}."
    )
    lr = float(track["lr"][place])
    advice = ADVICE.format(lr=f"{lr:.3g}" if np.isfinite(lr) else "it was not recorded")
    seen = Evidence((step,), (), numbers, track.optimizer)
    return Finding("exploding", "critical", title, seen, WHY, advice)


def _over_limit(run: RunData, track: OptimizerArrays) -> Iterator[Finding]:
    events = run.events_of(track, ("exploding",))
    if not len(events):
        return
    steps, values = events["step"].to_numpy(), events["value"].to_numpy()
    worst = events.iloc[int(np.argmax(values))]
    title = OVER_LIMIT.format(
        count=counted(len(steps), "step"), step=steps[0], value=float(worst["value"])
    )
    name = str(worst["parameter"])
    numbers = {"steps": float(len(steps)), "largest": float(worst["value"])}
    seen = Evidence(first_steps(steps), (name,) if name else (), numbers, track.optimizer)
    lr = float(track["lr"][-1])
    advice = ADVICE.format(lr=f"{lr:.3g}" if np.isfinite(lr) else "it was not recorded")
    yield Finding("exploding", "warning", title, seen, WHY, advice)

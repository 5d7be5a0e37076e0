"""Exploding: norms far above those at the start, or above the limit that the user set."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradwatch.record.wording import counted
from gradwatch.report.finding import Evidence, Finding, first_steps
from gradwatch.report.rates import rate_at
from gradwatch.report.run_data import OptimizerArrays, RunData
from gradwatch.report.thresholds import Thresholds

_BLOCK = 5
_START = 10

WHY = (
    "Updates follow the gradient: they throw the weights to where the loss is flat or not finite. "
    "What the model has learned is lost, with Adam as well."
)
ADVICE = (
    "Lower the learning rate ({lr}), at first by a factor of ten; warm it up over the first few "
    'hundred steps; clip with watch(..., clip="auto"). If it starts at step 1 with any learning '
    "rate, check the initial weights, layers without normalization, and each autograd.Function of "
    "your own with gradwatch.check_gradients(function)."
)
OVER_LIMIT = (
    "The norm was above exploding_norm in {count}, from step {step} on; the largest was "
    "{value:.4g}."
)


def exploding(run: RunData, limits: Thresholds) -> Iterator[Finding]:
    """Finds norms far above those at the start, or above ``watch(exploding_norm=)``."""
    for steps in run.optimizers:
        start, peak, row = growth(steps)
        # Growth from 0 has no factor; the rule zero_gradient reports such a start.
        if peak > limits.exploding * start > 0:
            yield _grown(run, steps, start, peak, row, limits)
        else:
            yield from _over_limit(run, steps)


def growth(steps: OptimizerArrays) -> tuple[float, float, int]:
    """Compares the norms of a run with those at its start.

    Compares medians of five steps, so that single spikes do not count. Only the last norm before a
    NaN counts alone, because no finite norm follows it.

    Returns:
        The usual norm at the start, the largest norm, and the row of the latter.
    """
    rows = np.flatnonzero(np.isfinite(steps["grad_norm"]))
    norms = steps["grad_norm"][rows].astype(float)
    if not len(norms):
        return 0.0, 0.0, 0
    # The first norm alone, if it is lower: a run that diverges at once has no usual start.
    start = float(min(norms[0], np.median(norms[:_START])))
    whole = len(norms) // _BLOCK * _BLOCK
    blocks = np.median(norms[:whole].reshape(-1, _BLOCK), axis=1)
    # The step of a peak is that of its block, which is what "around step" says.
    peak, row = 0.0, 0
    if len(blocks):
        peak, row = float(blocks.max()), int(rows[blocks.argmax() * _BLOCK])
    if rows[-1] + 1 < len(steps) and norms[-1] > peak:
        peak, row = float(norms[-1]), int(rows[-1])
    return start, peak, row


def _grown(
    run: RunData,
    steps: OptimizerArrays,
    start: float,
    peak: float,
    row: int,
    limits: Thresholds,
) -> Finding:
    step = int(steps.step[row])
    numbers = {"start": start, "largest": peak, "growth": peak / start, "limit": limits.exploding}
    title = (
        f"The gradient norm grew {peak / start:,.3g} times, from {start:.3g} at the start to "
        f"{peak:.3g} around step {step}."
    )
    seen = Evidence((step,), (), numbers, steps.optimizer)
    advice = ADVICE.format(lr=rate_at(run, steps, row))
    return Finding("exploding", "critical", title, seen, WHY, advice)


def _over_limit(run: RunData, steps: OptimizerArrays) -> Iterator[Finding]:
    # These events exist only with watch(exploding_norm=): the limit is the user's own.
    events = run.events_of(steps.optimizer, ("exploding",))
    if not events:
        return
    worst = max(events, key=lambda one: one.value)
    title = OVER_LIMIT.format(
        count=counted(len(events), "step"),
        step=events[0].step,
        value=worst.value,
    )
    name = worst.parameter
    numbers = {"steps": float(len(events)), "largest": float(worst.value)}
    first = first_steps(one.step for one in events)
    seen = Evidence(first, (name,) if name else (), numbers, steps.optimizer)
    advice = ADVICE.format(lr=rate_at(run, steps, -1, name))
    yield Finding("exploding", "warning", title, seen, WHY, advice)

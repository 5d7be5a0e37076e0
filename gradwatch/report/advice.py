"""Advice: what the steps of a run say about its clip, in a line that says what to change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import quantiles

from gradwatch.record.records import StepRecord

WINDOW = 1_000
LEAST = 100
OFTEN = 0.5

CLIPPED_OFTEN = (
    "{optimizer}: {rate:.0%} of the last {steps:,} steps were clipped, so the clip sets the size "
    "of most updates. Its limit is {threshold:.3g}, and nine steps in ten have a norm below "
    '{high:.3g}: raise the limit towards that, or write clip="auto".'
)
NEVER_CLIPPED = (
    "{optimizer}: none of the last {steps:,} steps was clipped: the largest norm was "
    "{largest:.3g}, the limit is {threshold:.3g}. A clip that is to catch outliers only belongs a "
    'little above the largest usual norm; clip="auto" finds that.'
)


def clip_rate(steps: Sequence[StepRecord], window: int = WINDOW) -> float:
    """Takes the share of steps that a clip has changed.

    Args:
        steps: The steps, oldest first.
        window: How many of the newest count; those that were not applied do not.

    Returns:
        A number from 0 to 1; NaN where there is no step.
    """
    newest = _newest_applied(steps, window)
    return sum(step.clipped for step in newest) / len(newest) if newest else math.nan


def clip_advice(steps: Sequence[StepRecord], window: int = WINDOW) -> list[str]:
    """Tells where a clip acts nearly always, or never.

    Args:
        steps: The steps of one or several optimizers, oldest first.
        window: How many of the newest of each count.

    Returns:
        One line per optimizer that there is something to say about, after at least 100 steps.
    """
    labels = dict.fromkeys(step.optimizer for step in steps)
    lines = [_line([s for s in steps if s.optimizer == label], window) for label in labels]
    return [line for line in lines if line]


def _line(steps: Sequence[StepRecord], window: int) -> str:
    newest = _newest_applied(steps, window)
    norms = sorted(step.grad_norm for step in newest if math.isfinite(step.grad_norm))
    if len(norms) < LEAST:
        return ""
    rate, last = clip_rate(newest, window), newest[-1]
    facts = {"optimizer": last.optimizer, "steps": len(newest), "threshold": last.clip_threshold}
    if rate > OFTEN:
        return CLIPPED_OFTEN.format(**facts, rate=rate, high=quantiles(norms, n=10)[-1])
    if rate == 0 and math.isfinite(last.clip_threshold):
        return NEVER_CLIPPED.format(**facts, largest=norms[-1])
    return ""


def _newest_applied(steps: Sequence[StepRecord], window: int) -> list[StepRecord]:
    return [step for step in steps if step.outcome == "applied"][-window:]

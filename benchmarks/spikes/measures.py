"""What is read off a run: steps to recover, false clips and the like."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from benchmarks.spikes.training import Run, Task

CLOSE = 0.03  # a share of the loss: two runs that differ in nothing but chance are as close


def steps_to_recover(
    curve: Sequence[tuple[int, float]], clean: Sequence[tuple[int, float]], last: int
) -> float:
    """Counts the steps from the last spiked one until the loss is back where it would have been.

    Args:
        curve: Steps and held-out losses.
        clean: The same of the run without spikes.
        last: The last spiked step.

    Returns:
        The steps until it is, for good, at most ``CLOSE`` above that of the clean run at the same
        step: 0 where it never was further, ``inf`` where it is at the end.
    """
    would = dict(clean)
    steps = [step for step, _ in curve if step >= last]
    far = [step for step, loss in curve if step >= last and not loss <= (1 + CLOSE) * would[step]]
    if not far:
        return 0
    return next((step - last for step in steps if step > far[-1]), math.inf)


def steps_to_stop(acted: Sequence[bool], first: int, span: int = 25) -> float:
    """Counts the steps from a lasting rise until a policy acts no more often than before it.

    Args:
        acted: Of each step, whether the policy clipped or skipped.
        first: The index of the first risen step.
        span: How many steps a share is taken over.

    Returns:
        The least k so that of the ``span`` steps from the k-th on, a share is acted on that
        is at most a tenth above that of the 2 * span steps before the rise; ``inf`` if none, and
        NaN where it acted on more than half of those, so that there is nothing to stop.
    """
    usual = statistics.fmean(acted[first - 2 * span : first])
    if usual > 0.5:
        return math.nan
    for start in range(first, len(acted) - span + 1):
        if statistics.fmean(acted[start : start + span]) <= usual + 0.1:
            return start - first
    return math.inf


def false_clips(task: Task, run: Run) -> list[bool]:
    """Tells of each applied step outside of the spikes whether it was clipped."""
    return [
        clipped
        for step, (clipped, applied) in enumerate(zip(run.clipped, run.applied, strict=True), 1)
        if applied and step not in task.spiked
    ]


def most_skips_in_a_row(run: Run) -> int:
    """Returns the length of the longest row of steps that were left out."""
    longest = current = 0
    for applied in run.applied:
        current = 0 if applied else current + 1
        longest = max(longest, current)
    return longest

"""What is measured from a run: steps to recover, false clips and so on."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from benchmarks.spikes.training import Run, Task

CLOSE = 0.03  # relative to the loss: two runs that differ only by chance are this close


def steps_to_recover(
    curve: Sequence[tuple[int, float]], clean: Sequence[tuple[int, float]], last: int
) -> float:
    """Counts the steps from the last spike until the loss is back where it would have been.

    Args:
        curve: Steps and held-out losses.
        clean: The same for the run without spikes.
        last: The last step with a spike.

    Returns:
        The steps until the loss stays at most ``CLOSE`` above that of the clean run at the same
        step: 0 if it never was further above, ``inf`` if it still is at the end.
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
        acted: For each step, whether the policy clipped or skipped.
        first: Index of the first step after the rise.
        span: Number of steps over which a share is taken.

    Returns:
        The smallest k such that the policy acts on ``span`` steps from the k-th on at most a tenth
        more often than on the 2 * span steps before the rise; ``inf`` if there is none. NaN if it
        acted on more than half of the steps before, so that there is nothing to stop.
    """
    usual = statistics.fmean(acted[first - 2 * span : first])
    if usual > 0.5:
        return math.nan
    for start in range(first, len(acted) - span + 1):
        if statistics.fmean(acted[start : start + span]) <= usual + 0.1:
            return start - first
    return math.inf


def false_clips(task: Task, run: Run) -> list[bool]:
    """Returns, for each applied step without a spike, whether it was clipped."""
    return [
        clipped
        for step, (clipped, applied) in enumerate(zip(run.clipped, run.applied, strict=True), 1)
        if applied and step not in task.spiked
    ]


def most_skips_in_a_row(run: Run) -> int:
    """Returns the largest number of steps in a row that were skipped."""
    longest = current = 0
    for applied in run.applied:
        current = 0 if applied else current + 1
        longest = max(longest, current)
    return longest

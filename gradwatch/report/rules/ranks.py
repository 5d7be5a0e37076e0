"""Ranks: the gradients of one process are unlike those of the others, or just the same."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradwatch.record.events import tells_of_same_data
from gradwatch.report.finding import Evidence, Finding
from gradwatch.report.run_data import OptimizerArrays, RunData
from gradwatch.report.thresholds import Thresholds

WHY = (
    "The mean over ranks is never larger than its largest part, so some other rank has at least "
    "{ratio:.3g} times this rank's gradient, and decides nearly alone where the weights go."
)
ADVICE = (
    "Check the other ranks: a data shard with other labels or lengths, a loss that is summed on "
    "one rank and averaged on the others, a different seed or augmentation. Compare loss and "
    "grad_norm_local on each rank."
)

SAME = 1e-5  # relative; as in step/replicas.py
SAME_STEPS = 10
SAME_TITLE = (
    "The ranks see the same data: in the last {steps:,} steps the mean gradient over the ranks was "
    "this rank's own."
)
SAME_WHY = (
    "The mean of gradients of different data is shorter than they are. With the same data the "
    "ranks repeat each other's work, and the batch counts once."
)
SAME_ADVICE = (
    "Unless this is intended, give each rank its own part of the data (DistributedSampler, with "
    "set_epoch() in every epoch), and seed by the rank what is random about the data."
)


def same_data(run: RunData, steps: OptimizerArrays) -> int:
    """Returns in how many of the newest steps in a row all ranks had one gradient.

    Returns:
        The number of steps; 0 if it is too small, or no event says that the data are the same:
        equal norms alone do not show that anybody has averaged the gradients.
    """
    told = run.events_of(steps.optimizer, ("mistake",))
    if not any(tells_of_same_data(one.message) for one in told):
        return 0
    total, local = steps["grad_norm"], steps["grad_norm_local"]
    with np.errstate(invalid="ignore"):  # Inf - Inf
        equal = np.abs(total - local) <= SAME * local
    other = np.flatnonzero(~(equal & (local > 0) & np.isfinite(local)))
    count = len(total) - (int(other[-1]) + 1 if len(other) else 0)
    return count if count >= SAME_STEPS else 0


def _same_data(run: RunData, steps: OptimizerArrays) -> Iterator[Finding]:
    count = same_data(run, steps)
    if count:
        step = int(steps.step[-count])
        seen = Evidence((step,), (), {"steps": float(count)}, steps.optimizer)
        title = SAME_TITLE.format(steps=count)
        yield Finding("same_data", "warning", title, seen, SAME_WHY, SAME_ADVICE)


def ranks(run: RunData, limits: Thresholds) -> Iterator[Finding]:
    """Finds that this rank's own gradients are smaller than those over all ranks, or the same."""
    for steps in run.optimizers:
        yield from _same_data(run, steps)
        total, local = steps["grad_norm"], steps["grad_norm_local"]
        rows = np.flatnonzero(np.isfinite(total) & np.isfinite(local) & (local > 0))
        if len(rows) < limits.few_steps:
            continue
        # grad_norm is the norm of the mean over ranks. It is usually below the local norm, because
        # parts of different direction cancel. If it is above, another rank has a larger part.
        ratios = total[rows] / local[rows]
        ratio = float(np.median(ratios))
        if ratio > limits.rank:
            title = (
                f"Another rank is unlike this one: the norm over all ranks is {ratio:.3g} times "
                f"the norm of this rank's own gradients (median of {len(rows):,} steps)."
            )
            step = int(steps.step[rows[int(np.argmax(ratios > limits.rank))]])
            seen = Evidence((step,), (), {"ratio": ratio, "limit": limits.rank}, steps.optimizer)
            yield Finding("rank", "warning", title, seen, WHY.format(ratio=ratio), ADVICE)

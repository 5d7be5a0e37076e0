"""Ranks: one process whose gradients are unlike those of the others."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradwatch.report.finding import Evidence, Finding
from gradwatch.report.run_data import RunData
from gradwatch.report.thresholds import Thresholds

WHY = (
    "The mean over ranks is never larger than the largest of its parts: another rank has "
    "{ratio:.3g} times this one's gradient or more, and decides nearly alone where the weights go."
)
ADVICE = (
    "Look at the data of the other ranks: a shard with other labels or lengths, a loss that is "
    "summed on one rank and averaged on the others, a seed or an augmentation that differs. "
    "Compare loss and grad_norm_local on each rank."
)


def ranks(run: RunData, limits: Thresholds) -> Iterator[Finding]:
    """Finds that the gradient over all ranks is larger than this rank's own."""
    for steps in run.optimizers:
        total, local = steps["grad_norm"], steps["grad_norm_local"]
        rows = np.flatnonzero(np.isfinite(total) & np.isfinite(local) & (local > 0))
        if len(rows) < limits.few_steps:
            continue
        # grad_norm is of the mean over ranks. One that is below the local norm is usual: parts of
        # unlike direction cancel. One that is above needs a larger part on another rank.
        ratios = total[rows] / local[rows]
        ratio = float(np.median(ratios))
        if ratio > limits.rank:
            title = (
                f"One rank is unlike this one: the norm over all ranks is {ratio:.3g} times that "
                f"of this rank's own gradients, in the median of {len(rows):,} steps."
            )
            step = int(steps.step[rows[int(np.argmax(ratios > limits.rank))]])
            seen = Evidence((step,), (), {"ratio": ratio, "limit": limits.rank}, steps.optimizer)
            yield Finding("rank", "warning", title, seen, WHY.format(ratio=ratio), ADVICE)

"""Ranks: the gradients of one process are unlike those of the others."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradwatch.report.finding import Evidence, Finding
from gradwatch.report.run_data import RunData
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


def ranks(run: RunData, limits: Thresholds) -> Iterator[Finding]:
    """Finds that the gradient over all ranks is larger than this rank's own gradient."""
    for steps in run.optimizers:
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

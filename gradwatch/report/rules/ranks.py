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
    """Finds that the gradient over all ranks is larger than this rank's own.

    Args:
        run: The run.
        limits: ``rank`` and ``few_steps``.
    """
    for track in run.tracks:
        total, local = track["grad_norm"], track["grad_norm_local"]
        rows = np.flatnonzero(np.isfinite(total) & np.isfinite(local) & (local > 0))
        if len(rows) < limits.few_steps:
            continue
        ratios = total[rows] / local[rows]
        ratio = float(np.median(ratios))
        if ratio > limits.rank:
            title = (
                f"One rank is unlike this one: the norm over all ranks is {ratio:.3g} times that "
                f"of this rank's own gradients, in the median of {len(rows):,} steps."
            )
            step = int(track.step[rows[int(np.argmax(ratios > limits.rank))]])
            seen = Evidence((step,), (), {"ratio": ratio, "limit": limits.rank}, track.optimizer)
            yield Finding("rank", "warning", title, seen, WHY.format(ratio=ratio), ADVICE)

"""Remarks: what a report could not look at, and what to record so that it can."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradwatch.explain.report.records import Run
from gradwatch.explain.report.thresholds import Thresholds

EMPTY = "There is no step in this run yet."
FEW = (
    "Few steps ({count}, where most rules need {few}): only NaN and Inf, missing gradients, "
    "loss scales and norms that explode were looked at."
)
NO_UPDATES = (
    "How large updates are for their weights was not recorded: "
    'watch(..., statistics=("update_ratio",), every=10).'
)
NO_ZEROS = (
    'Dead units within a layer were not recorded: watch(..., statistics=("zeros",), every=10).'
)
NOT_FROM_START = (
    "The first steps, up to {step}, are not there, so that norms were compared with those of later "
    "ones: keep the run with watch(..., run_dir=...)."
)


def remarks(run: Run | None, limits: Thresholds) -> Iterator[str]:
    """Lists what was not looked at.

    Args:
        run: The run; None where it is empty.
        limits: ``few_steps``.
    """
    if run is None:
        yield EMPTY
        return
    if len(run) < limits.few_steps:
        yield FEW.format(count=len(run), few=limits.few_steps)
    first = min(int(track.step[0]) for track in run.tracks)
    if first > 1:
        yield NOT_FROM_START.format(step=first - 1)
    for name, text in (("update_ratio", NO_UPDATES), ("zeros", NO_ZEROS)):
        taken = run.sample.statistics.get(name)
        if taken is None or not np.isfinite(taken).any():
            yield text

"""Zero gradients: the gradient of a parameter, or of units of a layer, is exactly zero."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradwatch.record.columns import Array
from gradwatch.record.wording import counted
from gradwatch.report.finding import Evidence, Finding, named
from gradwatch.report.run_data import RunData, medians
from gradwatch.report.thresholds import Thresholds

WHY = (
    "A parameter whose gradient is exactly zero does not learn. A ReLU that is off for every input "
    "passes nothing back, so it stays off, and no layer before it learns either. Gradients that "
    "are too small for their dtype also become zero."
)
ADVICE = (
    "The cause is right after the last of them in the model ({last}). Lower the learning rate or "
    "warm it up, because too large a step is what kills a ReLU; use LeakyReLU or GELU; check for "
    "biases that start far below zero, masks and factors of zero, and clamp() at its bounds."
)


def zero_gradient(run: RunData, limits: Thresholds) -> Iterator[Finding]:
    """Finds gradients of exactly zero in a large share of the steps."""
    zeros = (run.sample["grad_norm"] == 0) & run.sample.present
    seen = run.sample.present.sum(axis=0)
    # Count only steps with a gradient: a layer that is seldom used has few of them.
    share = zeros.sum(axis=0) / np.maximum(seen, 1)
    dead = np.flatnonzero(share >= limits.zero_share)
    if len(dead):
        yield _whole(run, dead, share, limits)
    yield from _units(run, limits, set(dead.tolist()))


def _whole(run: RunData, dead: Array, share: Array, limits: Thresholds) -> Finding:
    names = tuple(run.layout.names[index] for index in dead)
    least = float(share[dead].min())
    title = (
        f"{counted(len(names), 'parameter')} with a gradient of exactly zero in {_share(least)} "
        f"steps: {named(names)}."
    )
    rows = (run.sample["grad_norm"][:, dead] == 0).any(axis=1)
    numbers = {
        "parameters": float(len(names)),
        "of": float(len(run.layout.names)),
        "least_share": least,
        "limit": limits.zero_share,
    }
    seen = Evidence((int(run.sample.steps[rows][0]),), names, numbers)
    advice = ADVICE.format(last=names[-1])
    return Finding("zero_gradient", "critical", title, seen, WHY, advice)


def _share(share: float) -> str:
    return "all" if share == 1 else f"{share:.0%} or more of the"


def _units(run: RunData, limits: Thresholds, whole: set[int]) -> Iterator[Finding]:
    """Checks biases, if the share of elements with a zero gradient was recorded.

    Only biases: an element of a bias has a gradient of zero only if its unit is off for the whole
    batch. The rows of an embedding, for instance, have one whenever their word does not occur.
    """
    if "zeros" not in run.sample.columns or not run.layout.shapes:
        return
    shares = medians(run.sample["zeros"])
    # Leave out parameters whose whole gradient is zero: zero_gradient reported them.
    off = [
        index
        for index, shape in enumerate(run.layout.shapes)
        if len(shape) == 1 and shares[index] >= limits.dead_units and index not in whole
    ]
    if off:
        names = tuple(run.layout.names[index] for index in off)
        worst = float(shares[off].max())
        title = (
            f"Up to {worst:.0%} of the units of a layer have a gradient of exactly zero: "
            f"{named(names)}."
        )
        seen = Evidence((), names, {"largest_share": worst, "limit": limits.dead_units})
        yield Finding("dead_units", "warning", title, seen, WHY, ADVICE.format(last=names[-1]))

"""Accumulating: gradients that are never zeroed, so that each step uses all those before it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradwatch.record.columns import Array
from gradwatch.report.finding import Evidence, Finding
from gradwatch.report.run_data import OptimizerArrays, RunData
from gradwatch.report.thresholds import Thresholds

WHY = (
    "backward() adds to .grad. Without zero_grad() every step follows the sum of all gradients so "
    "far, overshoots, and swings back and forth."
)
ADVICE = (
    "Call optimizer.zero_grad() after each optimizer.step() (or before each backward that begins a "
    "step), or let gradwatch do it: watcher.backward(loss) and watcher.step()."
)


def accumulating(run: RunData, limits: Thresholds) -> Iterator[Finding]:
    """Finds norms that grow on a line from the first step on.

    Nothing in the records says whether a gradient was zeroed; but gradients of the same, hardly
    changed weights point the same way, so that their sum grows on a line. It needs the first steps
    of the run, which the buffer of a long live run keeps no more.
    """
    for steps in run.optimizers:
        norms = steps["grad_norm"][: limits.accumulating_steps].astype(float)
        # From step 1: later on nothing tells a sum of gradients from a loss that has grown.
        whole = len(norms) == limits.accumulating_steps and steps.step[0] == 1
        if not whole or not np.isfinite(norms).all() or norms[0] <= 0:
            continue
        # A norm that multiplies by a factor per step is a line in its logarithm: that is exploding.
        growth, fit, bent = norms[-3:].mean() / norms[0], line_fit(norms), line_fit(np.log(norms))
        if growth >= limits.accumulating and fit >= max(limits.accumulating_fit, bent):
            yield _finding(steps, float(growth), fit, limits)


def line_fit(values: Array) -> float:
    """Returns the share of the variance that a rising line over equal steps explains.

    Args:
        values: float ``[n]``, n at least 2.

    Returns:
        From 0 to 1; 0 where the line falls.

    Example:
        >>> line_fit(np.array([1.0, 2.0, 3.0]))
        1.0
    """
    if np.ptp(values) == 0:
        return 0.0
    # corrcoef divides by the deviation: a flat line was caught above.
    correlation = float(np.corrcoef(values, np.arange(len(values)))[0, 1])
    return round(max(correlation, 0.0) ** 2, 12)


def _finding(steps: OptimizerArrays, growth: float, fit: float, limits: Thresholds) -> Finding:
    count = limits.accumulating_steps
    title = (
        f"Gradients seem never to be zeroed: the norm grows on a line from the first step on, "
        f"{growth:.2g} times within {count} steps."
    )
    numbers = {"growth": growth, "fit": fit, "limit": limits.accumulating}
    seen = Evidence((1, count), (), numbers, steps.optimizer)
    return Finding("accumulating", "critical", title, seen, WHY, ADVICE)

"""Accumulating: gradients are never zeroed, so each step uses the sum of all so far."""

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
    "Call optimizer.zero_grad() after each optimizer.step() (or before the first backward of each "
    "step), or let gradwatch do it: watcher.backward(loss) and watcher.step()."
)


def accumulating(run: RunData, limits: Thresholds) -> Iterator[Finding]:
    """Finds norms that grow along a straight line from the first step on.

    The records do not say whether gradients were zeroed. But while the weights hardly change,
    gradients point the same way, so their sum grows along a line. This needs the first steps of the
    run, which the buffer of a long live run no longer holds.
    """
    for steps in run.optimizers:
        norms = steps["grad_norm"][: limits.accumulating_steps].astype(float)
        # From step 1 only: later, a sum of gradients looks the same as a loss that has grown.
        whole = len(norms) == limits.accumulating_steps and steps.step[0] == 1
        if not whole or not np.isfinite(norms).all() or (norms <= 0).any():
            continue
        # If the logarithm fits a line better, the norm grows by a factor per step: it explodes.
        growth, fit, bent = norms[-3:].mean() / norms[0], line_fit(norms), line_fit(np.log(norms))
        if growth >= limits.accumulating and fit >= max(limits.accumulating_fit, bent):
            yield _finding(steps, float(growth), fit, limits)


def line_fit(values: Array) -> float:
    """Returns the share of the variance that a rising straight line explains.

    Args:
        values: float ``[n]``, n at least 2, at equal distances.

    Returns:
        From 0 to 1; 0 if the line falls.

    Example:
        >>> line_fit(np.array([1.0, 2.0, 3.0]))
        1.0
    """
    if np.ptp(values) == 0:
        return 0.0
    # corrcoef divides by the deviation, which is not 0: flat values returned above.
    correlation = float(np.corrcoef(values, np.arange(len(values)))[0, 1])
    return round(max(correlation, 0.0) ** 2, 12)


def _finding(steps: OptimizerArrays, growth: float, fit: float, limits: Thresholds) -> Finding:
    count = limits.accumulating_steps
    title = (
        f"Gradients seem never to be zeroed: the norm grows along a straight line from the first "
        f"step on, {growth:.2g} times within {count} steps."
    )
    numbers = {"growth": growth, "fit": fit, "limit": limits.accumulating}
    seen = Evidence((1, count), (), numbers, steps.optimizer)
    return Finding("accumulating", "critical", title, seen, WHY, ADVICE)

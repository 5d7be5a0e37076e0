"""Unstable start: norms jump up within the first steps, and may come down again."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradwatch.report.finding import Evidence, Finding, Severity
from gradwatch.report.rates import rate_at
from gradwatch.report.run_data import OptimizerArrays, RunData
from gradwatch.report.thresholds import Thresholds

_FIRST = 6

WHY = (
    "The first steps threw the weights far from their initial values. With an optimizer that "
    "normalizes, such as Adam, the norms recover, but training goes on from a worse place."
)
ADVICE = (
    "Lower the learning rate ({lr}), at first by a factor of ten, or warm it up over a few hundred "
    'steps. Use watch(..., statistics=("update_ratio",)) to see how far each step goes.'
)


def unstable_start(run: RunData, limits: Thresholds) -> Iterator[Finding]:
    """Finds norms that grow several times over within the first six steps."""
    for steps in run.optimizers:
        norms = steps["grad_norm"][:_FIRST].astype(float)
        if steps.step[0] != 1 or len(norms) < _FIRST or not np.isfinite(norms).all():
            continue
        # Gradients that begin at exactly 0, behind a zero-initialized layer, jump by design.
        growth = float(norms.max() / norms[0]) if norms[0] > 0 else 0.0
        if growth > limits.start_leap:
            yield _finding(run, steps, growth, int(norms.argmax()), limits)


def _finding(
    run: RunData, steps: OptimizerArrays, growth: float, row: int, limits: Thresholds
) -> Finding:
    step = int(steps.step[row])
    title = f"The gradient norm grew {growth:.3g} times within the first {step} steps."
    numbers = {"growth": growth, "limit": limits.start_leap}
    advice = ADVICE.format(lr=rate_at(run, steps, row))
    seen = Evidence((step,), (), numbers, steps.optimizer)
    severity: Severity = "critical" if growth > limits.exploding else "warning"
    return Finding("unstable_start", severity, title, seen, WHY, advice)

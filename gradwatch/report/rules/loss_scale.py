"""Loss scale: a GradScaler finds no scale at which the gradients are finite."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradwatch.report.finding import Evidence, Finding, first_steps
from gradwatch.report.run_data import OptimizerArrays, RunData
from gradwatch.report.thresholds import Thresholds

WHY = (
    "The scaler halves its scale at every step with a NaN or Inf, and skips the step. If the scale "
    "keeps falling, the scale is not what causes them, and the model learns nothing."
)
ADVICE = (
    "Train a few steps in float32 or bfloat16. If NaN or Inf appear there as well, find their "
    "cause with this report. If not, keep the layers with the largest gradients{where} in float32, "
    "or lower the learning rate."
)


def loss_scale(run: RunData, limits: Thresholds) -> Iterator[Finding]:
    """Finds a loss scale that has collapsed."""
    for steps in run.optimizers:
        scales = steps["loss_scale"]
        rows = np.flatnonzero(np.isfinite(scales) & (scales > 0))
        # A scale of 1 throughout means that there is no scaler, or a disabled one.
        if not len(rows) or (scales[rows] == 1).all():
            continue
        # Compare with the largest, not the first: a scaler doubles its scale as long as it can.
        top, last = float(scales[rows].max()), float(scales[rows[-1]])
        halvings = float(np.log2(top / last))
        if halvings >= limits.scaler_halvings:
            numbers = {"largest": top, "last": last, "halvings": halvings}
            yield _finding(run, steps, numbers, limits)


def _finding(
    run: RunData, steps: OptimizerArrays, numbers: dict[str, float], limits: Thresholds
) -> Finding:
    events = run.events_of(steps.optimizer, ("nan", "inf"))
    names = tuple(dict.fromkeys(one.parameter for one in events))[:3]
    skipped = steps.step[steps.by_scaler]
    numbers |= {"skipped": float(len(skipped)), "limit": float(limits.scaler_halvings)}
    return Finding(
        "loss_scale",
        "critical",
        f"The loss scale collapsed from {numbers['largest']:,.6g} to "
        f"{numbers['last']:.3g}; {len(skipped):,} of {len(steps):,} steps were skipped.",
        Evidence(first_steps(skipped), names, numbers, steps.optimizer),
        WHY,
        ADVICE.format(where=f" (first seen in {names[0]})" if names else ""),
    )

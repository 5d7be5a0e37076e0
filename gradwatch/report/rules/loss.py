"""Rising loss: the losses, if gradwatch saw them, ended higher than they began."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradwatch.report.finding import Evidence, Finding
from gradwatch.report.rates import rate_at
from gradwatch.report.run_data import RunData
from gradwatch.report.thresholds import Thresholds

_ENDS = 10

WHY = "A model that is worse than an untrained one has not learned: its steps overshoot."
ADVICE = (
    "Lower the learning rate ({lr}), at first by a factor of ten, and warm it up. If that does "
    "not help, check the sign of the loss, and custom gradients with "
    "gradwatch.check_gradients(function)."
)


def rising_loss(run: RunData, limits: Thresholds) -> Iterator[Finding]:
    """Finds losses that ended far above their start; negative losses are not judged."""
    for steps in run.optimizers:
        rows = np.flatnonzero(np.isfinite(steps["loss"]))
        if len(rows) < limits.few_steps:
            continue
        losses = steps["loss"][rows]
        start, end = float(np.median(losses[:_ENDS])), float(np.median(losses[-_ENDS:]))
        # A factor means something only for positive numbers; log-likelihoods may cross zero.
        if 0 < limits.loss_rise * min(start, losses[0]) < end:
            start = min(start, float(losses[0]))
            yield Finding(
                "loss_rising",
                "critical",
                f"The loss rose from {start:.4g} to {end:.4g}.",
                Evidence(
                    (int(steps.step[rows[-_ENDS]]),),
                    (),
                    {"start": start, "end": end, "limit": limits.loss_rise},
                    steps.optimizer,
                ),
                WHY,
                ADVICE.format(lr=rate_at(run, steps, int(rows[-1]))),
            )

"""Noise scale: a batch that is far too small, or far too large, for the noise of its gradients."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradwatch.report.finding import Evidence, Finding
from gradwatch.report.run_data import RunData
from gradwatch.report.thresholds import Thresholds

_ERRORS = 2.0

TITLE = "The batch is {word}: {batch:.4g}, where the noise scale is {noise:.3g} ± {error:.2g}."
SMALL_WHY = "Most of each gradient is noise: a larger batch takes about as many steps fewer."
LARGE_WHY = "A smaller batch gives nearly the same gradient: most of the examples bring nothing."
SMALL = 'Accumulate more micro-batches: watch(..., accumulate="auto") follows the noise scale.'
LARGE = (
    "Take a smaller batch and more steps, down to some times the noise scale. It rises while the "
    "loss falls, so leave room."
)


def noise(run: RunData, limits: Thresholds) -> Iterator[Finding]:
    """Compares the newest noise scale with the batch; both are in the unit of the weights."""
    for steps in run.optimizers:
        rows = np.flatnonzero(np.isfinite(steps["noise_scale"]))
        if not len(rows):
            continue
        # The newest only: it rises while the loss falls, and what counts is the batch to come.
        row = int(rows[-1])
        scale, batch = float(steps["noise_scale"][row]), float(steps["weight"][row])
        error = float(steps["noise_scale_stderr"][row])
        if not (np.isfinite(error) and batch > 0):
            continue
        seen = Evidence(
            (int(steps.step[row]),),
            (),
            {"noise_scale": scale, "stderr": error, "batch": batch, "limit": limits.noise},
            steps.optimizer,
        )
        facts = {"batch": batch, "noise": scale, "error": error}
        if scale - _ERRORS * error > limits.noise * batch:
            title = TITLE.format(word="small", **facts)
            yield Finding("batch_small", "note", title, seen, SMALL_WHY, SMALL)
        elif (scale + _ERRORS * error) * limits.noise < batch:
            title = TITLE.format(word="large", **facts)
            yield Finding("batch_large", "note", title, seen, LARGE_WHY, LARGE)

"""Noise scale: the batch is far too small, or far too large, for the noise of its gradients."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradwatch.report.finding import Evidence, Finding
from gradwatch.report.rules.ranks import same_data
from gradwatch.report.run_data import RunData
from gradwatch.report.thresholds import Thresholds

_ERRORS = 2.0

TITLE = "The batch is {word}: {batch:.4g}, with a noise scale of {scale}."
ABOUT = "{noise:.3g} ± {error:.2g}"
AT_LEAST = "at least {low:.3g}"  # where the upper end of the interval is not known
SMALL_WHY = "Most of each gradient is noise: a batch of twice the size needs about half the steps."
LARGE_WHY = "A smaller batch gives nearly the same gradient: most of the examples add nothing."
SMALL = 'Accumulate more micro-batches: watch(..., accumulate="auto") follows the noise scale.'
LARGE = (
    "Use a smaller batch and more steps, but keep the batch at a few times the noise scale: it "
    "rises while the loss falls."
)


def noise(run: RunData, limits: Thresholds) -> Iterator[Finding]:
    """Compares the newest noise scale with the batch size, both in units of ``weight``."""
    for steps in run.optimizers:
        rows = np.flatnonzero(np.isfinite(steps["noise_scale"]))
        if not len(rows) or same_data(run, steps):  # batches that repeat each other show no noise
            continue
        # Only the newest: the noise scale rises while the loss falls, and the next batch matters.
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
        # Run folders of earlier versions have no interval.
        low, high = (float(steps[f"noise_scale_{end}"][row]) for end in ("low", "high"))
        about = (
            AT_LEAST.format(low=low) if high == np.inf else ABOUT.format(noise=scale, error=error)
        )
        facts = {"batch": batch, "scale": about}
        # A limit inside of the interval may not be exceeded in truth.
        if low <= limits.noise * batch < scale or scale < batch / limits.noise <= high:
            continue
        if scale - _ERRORS * error > limits.noise * batch:
            title = TITLE.format(word="small", **facts)
            yield Finding("batch_small", "note", title, seen, SMALL_WHY, SMALL)
        elif (scale + _ERRORS * error) * limits.noise < batch:
            title = TITLE.format(word="large", **facts)
            yield Finding("batch_large", "note", title, seen, LARGE_WHY, LARGE)

"""How often a clip acts, and what to change where that is nearly always, or never."""

from __future__ import annotations

import math
from statistics import quantiles

import numpy as np

from gradwatch.record.columns import Source, Span, array_of
from gradwatch.report.run_data import OptimizerArrays, by_optimizer, equals

NEWEST_STEPS = 1_000
FEWEST_NORMS = 100
OFTEN = 0.5

CLIPPED_OFTEN = (
    "{optimizer}: {rate:.0%} of the last {steps:,} steps were clipped, so the clip sets the size "
    "of most updates. Its limit is {threshold:.3g}, and nine steps in ten have a norm below "
    '{high:.3g}: raise the limit towards that, or write clip="auto".'
)
NEVER_CLIPPED = (
    "{optimizer}: none of the last {steps:,} steps was clipped: the largest norm was "
    "{largest:.3g}, the limit is {threshold:.3g}. A clip that is to catch outliers only belongs a "
    'little above the largest usual norm; clip="auto" finds that.'
)


def clip_rate(source: Source, window: int) -> float:
    """Returns the share of the newest applied steps that a clip has changed; NaN without a step."""
    table = source.steps(("outcome", "clipped"), Span())
    clipped = array_of(table["clipped"])[equals(table["outcome"], "applied")][-window:]
    # The mean of no number is a warning.
    return float(clipped.mean()) if len(clipped) else math.nan


def clip_advice(source: Source) -> list[str]:
    """Returns a line per optimizer whose clip acts nearly always, or never."""
    columns = ("step", "optimizer", "outcome", "grad_norm", "clip_threshold", "clipped")
    table = source.steps(columns, Span())
    # Steps that were left out say nothing of the clip: their norms were bad, or their spikes cut.
    applied = equals(table["outcome"], "applied")
    steps_of = by_optimizer({name: column[applied] for name, column in table.items()})
    return [line for steps in steps_of if (line := _line(steps))]


def _line(steps: OptimizerArrays) -> str:
    norms = steps["grad_norm"][-NEWEST_STEPS:]
    finite = norms[np.isfinite(norms)].tolist()
    if len(finite) < FEWEST_NORMS:
        return ""
    rate = float(steps["clipped"][-NEWEST_STEPS:].mean())
    threshold = float(steps["clip_threshold"][-1])
    facts = {"optimizer": steps.optimizer, "steps": len(norms), "threshold": threshold}
    if rate > OFTEN:
        return CLIPPED_OFTEN.format(**facts, rate=rate, high=quantiles(finite, n=10)[-1])
    # An infinite limit is that of a policy which has not seen enough norms to set one.
    if rate == 0 and math.isfinite(threshold):
        return NEVER_CLIPPED.format(**facts, largest=max(finite))
    return ""

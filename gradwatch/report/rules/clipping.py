"""Clipping: a clip acts on most steps, or on none; suggests a limit that would suit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import quantiles

import numpy as np

from gradwatch.record.columns import Array, Source, Span, truths_in
from gradwatch.report.finding import Evidence, Finding
from gradwatch.report.run_data import OptimizerArrays, RunData, by_optimizer, equals
from gradwatch.report.thresholds import Thresholds

_FEWEST = 100
_SAME_NORM = 0.01

OFTEN_WHY = (
    "The clip, not the gradient, sets the size of most updates: limit and learning rate then act "
    "as one number, and outliers are treated like all other steps."
)
NEVER_WHY = "A limit that far away protects from nothing: a step of twice the usual norm passes."
ADVICE = (
    "A limit between {low:.3g} and {high:.3g} would clip 1 to 5 % of these steps; "
    'watch(..., clip="auto") finds one, and follows the norms.'
)
OF_ELEMENTS = "The limit is not one on the total norm, so these norms cannot suggest a better one."


def clipping(run: RunData, limits: Thresholds) -> Iterator[Finding]:
    """Finds a clip that acts on most steps, or on none.

    Policies without a limit for the whole gradient act on most steps by design; they do not count.
    """
    for steps in run.optimizers:
        # A skipped step was not clipped, whatever its norm.
        sound = steps.clip_known & np.isfinite(steps["grad_norm"])
        rows = np.flatnonzero(sound & np.isfinite(steps["clip_threshold"]))[-limits.clip_steps :]
        if len(rows) >= _FEWEST:
            yield from _of_newest(steps, rows, limits)


def _of_newest(steps: OptimizerArrays, rows: Array, limits: Thresholds) -> Iterator[Finding]:
    norms, limit = steps["grad_norm"][rows], float(steps["clip_threshold"][rows[-1]])
    rate = float(steps["clipped"][rows].mean())
    seen, advice = _limits_that_suit(steps, rows, {"rate": rate, "limit": limit})
    if rate > limits.clip_often:
        title = (
            f"{rate:.0%} of the last {len(rows):,} steps were clipped, at a limit of {limit:.3g}."
        )
        yield Finding("clip_always", "warning", title, seen, OFTEN_WHY, advice)
    # If all norms are 0, any limit is far away, but that is not the problem: hence the > 0.
    elif rate == 0 and limit > limits.clip_far * norms.max() > 0:
        title = (
            f"None of the last {len(rows):,} steps was clipped: the limit is {limit:.3g}, the "
            f"largest norm {norms.max():.3g}."
        )
        yield Finding("clip_never", "note", title, seen, NEVER_WHY, advice)


def _limits_that_suit(
    steps: OptimizerArrays, rows: Array, numbers: dict[str, float]
) -> tuple[Evidence, str]:
    advice = OF_ELEMENTS
    if _is_norm(steps, rows):
        low, high = map(float, np.quantile(steps["grad_norm"][rows], (0.95, 0.99)))
        numbers |= {"clips_5_percent": low, "clips_1_percent": high}
        advice = ADVICE.format(low=low, high=high)
    span = (int(steps.step[rows[0]]), int(steps.step[rows[-1]]))
    return Evidence(span, (), numbers, steps.optimizer), advice


def _is_norm(steps: OptimizerArrays, rows: Array) -> bool:
    """Tells whether clipped norms end at the limit: not so if the limit is one for elements."""
    clipped = rows[steps["clipped"][rows] == 1]
    if not len(clipped):
        return True
    ends = steps["grad_norm_clipped"][clipped] / steps["clip_threshold"][clipped]
    # The records do not name the policy. The median, because the clip may have changed meanwhile.
    return bool(abs(np.median(ends) - 1) < _SAME_NORM)


NEWEST_STEPS = 1_000
FEWEST_NORMS = 100
OFTEN = 0.5

CLIPPED_OFTEN = (
    "{optimizer}: {rate:.0%} of the last {steps:,} steps were clipped, so the clip sets the size "
    "of most updates. Its limit is {threshold:.3g}, and nine steps in ten have a norm below "
    '{high:.3g}: raise the limit toward that, or write clip="auto".'
)
NEVER_CLIPPED = (
    "{optimizer}: none of the last {steps:,} steps was clipped: the largest norm was "
    "{largest:.3g}, the limit is {threshold:.3g}. To catch outliers only, set the limit a little "
    'above the largest usual norm; clip="auto" finds that.'
)


def clip_rate(source: Source, window: int) -> float:
    """Returns the share of clipped steps among the newest applied ones; NaN if there is none.

    Steps of which it is not known are left out.
    """
    table = source.steps(("outcome", "clipped"), Span())
    found = truths_in(table["clipped"])
    clipped = found.values[equals(table["outcome"], "applied") & found.known][-window:]
    # NumPy warns about the mean of an empty array.
    return float(clipped.mean()) if len(clipped) else math.nan


def clip_advice(source: Source) -> list[str]:
    """Returns a line for each optimizer whose clip acts on most steps, or on none."""
    columns = ("step", "optimizer", "outcome", "grad_norm", "clip_threshold", "clipped")
    table = source.steps(columns, Span())
    # Skipped steps say nothing about the clip: their gradients were bad, or they were spikes.
    kept = equals(table["outcome"], "applied") & truths_in(table["clipped"]).known
    steps_of = by_optimizer({name: column[kept] for name, column in table.items()})
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
    # The limit is infinite while a policy has not seen enough norms to set one.
    if rate == 0 and math.isfinite(threshold):
        return NEVER_CLIPPED.format(**facts, largest=max(finite))
    return ""

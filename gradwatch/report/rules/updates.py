"""Updates: steps are too large or too small for the weights that they change."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradwatch.report.finding import Evidence, Finding, named
from gradwatch.report.rates import usual_rate
from gradwatch.report.run_data import RunData, medians
from gradwatch.report.thresholds import Thresholds

LARGE_WHY = "Weights that are rewritten within a few steps forget what they have learned."
SMALL_WHY = "At this pace the weights effectively keep their initial values."
LARGE = (
    "Lower the learning rate ({lr}) until a step changes weights by about 1e-3 of their size, and "
    "warm it up: the first steps of Adam are the largest."
)
SMALL = (
    "Raise the learning rate ({lr}) gradually, toward a ratio of 1e-3; check that the loss is not "
    "divided by a large number, and that no schedule has brought the learning rate to 0."
)


def updates(run: RunData, limits: Thresholds) -> Iterator[Finding]:
    """Finds updates out of proportion; needs ``watch(statistics=("update_ratio",))``.

    Only matrices are judged: a bias or a gain may begin at 0, where every ratio is large. Updates
    count as too small only if they were so throughout the run: at the end of a learning rate
    schedule they are small on purpose.
    """
    if "update_ratio" not in run.sample.columns or not run.layout.shapes:
        return
    ratios = run.sample["update_ratio"][:, run.matrices]
    ratios = ratios[np.isfinite(ratios).any(axis=1)]
    if not len(ratios):
        return
    names = [n for n, is_matrix in zip(run.layout.names, run.matrices, strict=True) if is_matrix]
    # Medians over steps and over parameters: a single odd one does not count.
    usual, over_time = medians(ratios), medians(ratios.T)
    leap, largest = float(over_time.max()), float(np.quantile(over_time, 0.9))
    if np.nanmedian(usual) > limits.update_large or leap > limits.update_leap:
        order = np.argsort(-np.nan_to_num(usual), kind="stable")
        above = [i for i in order if usual[i] > limits.update_large] or list(order[:1])
        yield _large(run, float(np.nanmedian(usual)), leap, [names[i] for i in above], limits)
    elif 0 < largest < limits.update_small:
        order = np.argsort(np.nan_to_num(usual, nan=np.inf), kind="stable")
        below = [i for i in order if usual[i] < limits.update_small] or list(order[:1])
        yield _small(run, largest, [names[i] for i in below], limits)


def _large(
    run: RunData, ratio: float, leap: float, names: list[str], limits: Thresholds
) -> Finding:
    title = (
        f"A typical step changes the weights by {ratio:.2g} of their size, the largest by "
        f"{leap:.2g}; most of all {named(names)}."
    )
    numbers = {"update_ratio": ratio, "limit": limits.update_large}
    numbers |= {"largest": leap, "limit_of_one": limits.update_leap}
    seen = Evidence((), tuple(names), numbers)
    advice = LARGE.format(lr=usual_rate(run, names[0]))
    return Finding("update_large", "warning", title, seen, LARGE_WHY, advice)


def _small(run: RunData, ratio: float, names: list[str], limits: Thresholds) -> Finding:
    title = f"A step changes the weights by at most {ratio:.2g} of their size."
    seen = Evidence((), tuple(names), {"update_ratio": ratio, "limit": limits.update_small})
    advice = SMALL.format(lr=usual_rate(run, names[0]))
    return Finding("update_small", "warning", title, seen, SMALL_WHY, advice)

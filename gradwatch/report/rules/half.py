"""Half precision: small gradients lie on the grid of float16, at its lower end."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradwatch.record.columns import Array
from gradwatch.record.wording import counted
from gradwatch.report.finding import Evidence, Finding, named
from gradwatch.report.run_data import RunData
from gradwatch.report.thresholds import Thresholds

SMALLEST = 2.0**-24
"""The smallest float16 above 0; every float16 is an integer multiple of it."""

_MOST = 400.0  # in units of SMALLEST: up to here float32 gives squared norms to within a tenth
_NEAR = 0.1
_FEWEST = 20

WHY = (
    "In float16 an element below 6e-8 becomes 0, and one below 6e-5 loses digits: small gradients "
    "vanish, however well the model is built. {zeros} of the sampled norms are exactly 0."
)
ADVICE = (
    "Scale the loss with torch.amp.GradScaler: scaler.scale(loss).backward(), scaler.step and "
    "scaler.update. Or use bfloat16, which has the range of float32; keep the weights in float32."
)


def half(run: RunData, limits: Thresholds) -> Iterator[Finding]:
    """Finds small gradients that went through float16 without a loss scale.

    The records hold no dtype. But if each element is an integer multiple of 2**-24, the squared
    norm is an integer multiple of 2**-48. Of other norms, one in five passes by chance.
    """
    # With a loss scale, gradients are divided by it and lie on a finer grid than this rule knows.
    if any((steps["loss_scale"] != 1).any() for steps in run.optimizers):
        return
    small = whole_norms(run.sample["grad_norm"])
    per_parameter = np.nan_to_num(small).sum(axis=0)
    counted_norms = np.isfinite(small).sum(axis=0)
    if counted_norms.sum() < _FEWEST:
        return
    share = float(per_parameter.sum() / counted_norms.sum())
    if share >= limits.half_share:
        # The parameters with most small norms come first: the others prove little.
        order = np.argsort(-counted_norms, kind="stable")
        names = [run.layout.names[i] for i in order if counted_norms[i]]
        yield _finding(run, names, share, int(counted_norms.sum()), limits)


def whole_norms(norms: Array) -> Array:
    """Tells which small norms can be norms of float16 numbers.

    Args:
        norms: float, any shape, exact to float32.

    Returns:
        float64 of the same shape: 1 for yes, 0 for no, NaN if the norm is 0 or too large to tell.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        steps = norms.astype(float) / SMALLEST
        squares = np.square(steps)
        result = (np.abs(squares - np.rint(squares)) < _NEAR) & (squares > _NEAR)
        small = np.isfinite(steps) & (steps > 0) & (steps <= _MOST)
    return np.where(small, result, np.nan)


def _finding(
    run: RunData, names: list[str], share: float, count: int, limits: Thresholds
) -> Finding:
    present = max(int(run.sample.present.sum()), 1)
    zeros = float((run.sample["grad_norm"] == 0).sum()) / present
    title = (
        f"Gradients of {counted(len(names), 'parameter')} are at the lower end of float16, with no "
        f"loss scale: {named(names)}."
    )
    numbers = {
        "share": share,
        "norms": float(count),
        "zeros": zeros,
        "smallest": SMALLEST,
        "limit": limits.half_share,
    }
    seen = Evidence((), tuple(names), numbers)
    return Finding(
        "half_precision", "critical", title, seen, WHY.format(zeros=f"{zeros:.0%}"), ADVICE
    )

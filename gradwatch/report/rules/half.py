"""Half precision: small gradients that are whole numbers of float16's smallest step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradwatch.record.columns import Array
from gradwatch.report.finding import Evidence, Finding, counted, named
from gradwatch.report.run_data import RunData
from gradwatch.report.thresholds import Thresholds

SMALLEST = 2.0**-24
"""The smallest float16 above 0; each float16 is a whole number of times as large."""

_MOST = 400.0  # in those steps: a float32 tells the squares of such norms to a tenth
_NEAR = 0.1
_FEWEST = 20

WHY = (
    "An element below 6e-8 is 0 in float16, and one below 6e-5 has lost digits: small gradients "
    "vanish, however well the model is built. {zeros} of the sampled norms are exactly 0."
)
ADVICE = (
    "Scale the loss: torch.amp.GradScaler with scaler.scale(loss).backward(), scaler.step and "
    "scaler.update. Or use bfloat16, which has the range of float32; keep the weights in float32."
)


def half(run: RunData, limits: Thresholds) -> Iterator[Finding]:
    """Finds gradients that went through float16 without a loss scale and are small.

    The records hold no dtype. But if each element is a whole number of steps of 2**-24, so is
    the square of the norm in squares of them; of other norms one in five is near enough.
    """
    # Divided by its scale, a float16 gradient lies on a finer grid than this rule knows.
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
    """Tells which small norms can be those of float16 numbers.

    Args:
        norms: float, any shape, exact to float32.

    Returns:
        float64 like it: 1 where it can, 0 where it cannot, NaN where it is 0 or too large to tell.
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

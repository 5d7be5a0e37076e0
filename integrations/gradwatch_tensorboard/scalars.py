"""The handful of numbers that stand for one optimizer step, their tags and their charts."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.tensorboard.summary import custom_scalars

from gradwatch.record.records import StepRecord

QUANTILES = (0.05, 0.5, 0.95, 1.0)


def norm_spread(norms: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Takes the 5th, 50th, 95th and 100th percentile of each row.

    Only finite norms count: parameters without a gradient (-1) and those with a NaN or an Inf are
    left out. Percentiles between two norms are interpolated linearly, as ``numpy.percentile`` does.

    Args:
        norms: float array ``[steps, parameters]``; ``NO_GRADIENT`` (-1) where there was none.

    Returns:
        float64 array ``[steps, 4]``; NaN in a row that holds no finite norm.
    """
    if norms.shape[1] == 0:
        return np.full((len(norms), len(QUANTILES)), np.nan)
    usable = (norms >= 0) & (norms < np.inf)
    counts = np.count_nonzero(usable, axis=1)
    ascending = np.where(usable, norms, np.inf)
    ascending.sort(axis=1)

    position = np.maximum(counts - 1, 0)[:, None] * np.array(QUANTILES)
    lower = np.floor(position).astype(np.intp)
    upper = np.ceil(position).astype(np.intp)
    low = np.take_along_axis(ascending, lower, axis=1).astype(np.float64)
    high = np.take_along_axis(ascending, upper, axis=1).astype(np.float64)
    low[counts == 0] = high[counts == 0] = np.nan
    spread: NDArray[np.float64] = low + (position - lower) * (high - low)
    return spread


@dataclass(frozen=True, slots=True)
class Scalar:
    """One series of numbers.

    Attributes:
        meaning: What TensorBoard shows when its user asks about the chart.
        thin: Turns the values since the last written step into the one that is written.
    """

    meaning: str
    thin: Callable[[Sequence[float]], float]


def largest(values: Sequence[float]) -> float:
    """Takes the largest value; a NaN among them wins, so that thinning never hides one."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def smallest(values: Sequence[float]) -> float:
    """Takes the smallest value; a NaN among them wins, so that thinning never hides one."""
    return math.nan if any(map(math.isnan, values)) else min(values)


def middle(values: Sequence[float]) -> float:
    """Takes the median of the values that are numbers."""
    numbers = sorted(value for value in values if not math.isnan(value))
    return numbers[len(numbers) // 2] if numbers else math.nan


def newest(values: Sequence[float]) -> float:
    """Takes the last value."""
    return values[-1]


STEP_SCALARS = {
    "grad_norm": Scalar("Total L2 gradient norm before the clip, in true units.", largest),
    "grad_norm_clipped": Scalar("Total gradient norm after the clip.", largest),
    "clip_coef": Scalar("Factor that the clip multiplied gradients with; 1: no clip.", smallest),
    "clip_rate": Scalar("Share of the last 1,000 applied steps that were clipped.", newest),
    "norm_p05": Scalar("5th percentile over the parameters' norms before the clip.", smallest),
    "norm_p50": Scalar("Median over the parameters' norms before the clip.", middle),
    "norm_p95": Scalar("95th percentile over the parameters' norms before the clip.", largest),
    "norm_max": Scalar("Largest finite norm of a parameter before the clip.", largest),
    "nonfinite_steps_total": Scalar("Steps so far with a NaN or Inf gradient.", newest),
    "skipped_steps_total": Scalar("Steps so far that were not applied.", newest),
    "loss": Scalar("Weighted mean of the losses of the step.", newest),
    "lr": Scalar("Learning rate of the first parameter group.", newest),
    "loss_scale": Scalar("Scale of the GradScaler.", newest),
    "noise_scale": Scalar("Gradient noise scale, in the unit of the weights.", newest),
    "weight": Scalar("The batch: sum of the micro-batches' weights.", newest),
    "micro_batches": Scalar("Backward passes whose gradients are in the step.", newest),
    "hessian_eigenvalue": Scalar("Largest eigenvalue of the Hessian after the step.", newest),
    "hessian_trace": Scalar("Trace of the Hessian after the step, an estimate.", newest),
}
"""Every scalar of a step by its name, in the order in which they are written."""


@dataclass(slots=True)
class StepScalars:
    """Turns the records of one optimizer into its step scalars.

    Attributes:
        nonfinite_steps: Steps so far with a NaN or an Inf in a gradient.
        skipped_steps: Steps so far that were not applied.
        scaled: Whether a loss scale other than 1 was seen.
        accumulated: Whether a step of several micro-batches, or a noise scale, was seen.
    """

    nonfinite_steps: int = field(default=0, init=False)
    skipped_steps: int = field(default=0, init=False)
    scaled: bool = field(default=False, init=False)
    accumulated: bool = field(default=False, init=False)
    _clipped: deque[bool] = field(default_factory=lambda: deque(maxlen=1_000), init=False)

    def of(self, record: StepRecord, spread: Sequence[float]) -> dict[str, float]:
        """Lists the scalars of one step.

        Args:
            record: The step.
            spread: The four percentiles of :func:`~gradwatch_tensorboard.scalars.norm_spread`.

        Returns:
            Name to value. A loss or learning rate that is not a finite number is left out, and so
            is a loss scale as long as it was never anything but 1. The batch is in it from the
            first step on that has several micro-batches or a noise scale; the curvature at the
            steps at which it was taken.
        """
        self.nonfinite_steps += record.nonfinite_parameters > 0
        self.skipped_steps += record.outcome != "applied"
        self.scaled = self.scaled or record.loss_scale != 1.0
        self.accumulated = self.accumulated or accumulates(record)
        if record.outcome == "applied":
            self._clipped.append(record.clipped)
        p05, p50, p95, maximum = spread
        row = {
            "grad_norm": record.grad_norm,
            "grad_norm_clipped": record.grad_norm_clipped,
            "clip_coef": record.clip_coef,
            "clip_rate": sum(self._clipped) / max(len(self._clipped), 1),
            "norm_p05": p05,
            "norm_p50": p50,
            "norm_p95": p95,
            "norm_max": maximum,
            "nonfinite_steps_total": float(self.nonfinite_steps),
            "skipped_steps_total": float(self.skipped_steps),
        }
        if math.isfinite(record.loss):
            row["loss"] = record.loss
        if math.isfinite(record.lr):
            row["lr"] = record.lr
        if self.scaled:
            row["loss_scale"] = record.loss_scale
        if _is_known(record):
            row["noise_scale"] = record.noise_scale
        if self.accumulated:
            row["weight"] = record.weight
            row["micro_batches"] = float(record.micro_batches)
        for name in ("hessian_eigenvalue", "hessian_trace"):
            if math.isfinite(value := getattr(record, name)):
                row[name] = value
        return row


def accumulates(record: StepRecord) -> bool:
    """Tells whether a step has a batch to speak of: several micro-batches, or a noise scale."""
    return record.micro_batches > 1 or math.isfinite(record.noise_scale)


def _is_known(record: StepRecord) -> bool:
    """Tells whether a noise scale is more than its standard error.

    Where it is less, it says nothing, and may be so large that nothing else is seen on its axis.
    """
    return 0 <= record.noise_scale_stderr < record.noise_scale < math.inf


_SPREAD = ["gradwatch/norm_p50", "gradwatch/norm_p05", "gradwatch/norm_p95"]


def chart_layout(*, step_scalars: bool, accumulates: bool = False) -> Any:
    """Lays out the charts that one scalar each cannot show.

    Args:
        step_scalars: Whether the percentiles are written, which the spread is drawn from.
        accumulates: Whether steps have a batch that the noise scale is to be compared with.

    Returns:
        A ``Summary`` for the tag that the dashboard reads. Multiline charts name their tags by
        regular expressions, so that further optimizers are in them as soon as they appear.
    """
    charts: dict[str, list[Any]] = {
        "norm before and after the clip": [
            "Multiline",
            ["gradwatch[^/]*/grad_norm$", "gradwatch[^/]*/grad_norm_clipped$"],
        ],
    }
    if step_scalars:
        charts["norms over parameters: median, 5 % to 95 %"] = ["Margin", _SPREAD]
    if step_scalars and accumulates:
        charts["batch and noise scale"] = [
            "Multiline",
            ["gradwatch[^/]*/noise_scale$", "gradwatch[^/]*/weight$"],
        ]
    charts["norms of module blocks"] = ["Multiline", ["gradwatch[^/]*_blocks/.*"]]
    return custom_scalars({"gradwatch": charts})  # type: ignore[no-untyped-call]  # torch's own

"""Scalars: the handful of numbers that stand for a step of one optimizer, their tags and charts.

:class:`OptimizerSeries` is what the writer holds of each optimizer. One row of scalars may stand
for several steps, and steps only ever rise.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.tensorboard.summary import custom_scalars

from gradwatch.record.records import StepRecord

QUANTILES = (0.05, 0.5, 0.95, 1.0)

Row = dict[str, float]
"""Name to value, for one step. A name may be missing in some steps."""


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
    """Returns the largest value; a NaN among them wins, so that thinning never hides one."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def smallest(values: Sequence[float]) -> float:
    """Returns the smallest value; a NaN among them wins, so that thinning never hides one."""
    return math.nan if any(map(math.isnan, values)) else min(values)


def middle(values: Sequence[float]) -> float:
    """Returns the median of the values that are numbers."""
    numbers = sorted(value for value in values if not math.isnan(value))
    return numbers[len(numbers) // 2] if numbers else math.nan


def newest(values: Sequence[float]) -> float:
    """Returns the last value."""
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

NONFINITE_EVENT = "nonfinite_event"

_NONFINITE_MEANING = "Parameters with a NaN or Inf gradient; written at such steps only."
_BLOCK_MEANING = "L2 norm over the parameters of this part of the model, before the clip."


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
            spread: The four percentiles of :func:`norm_spread`.

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
        # From the first on that says something: most runs have no scaler and no accumulation, and
        # need no charts of ones.
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
    """Tells whether a noise scale is more than its standard error."""
    # One that is less says nothing, and may be so large that nothing else is seen on its axis.
    return 0 <= record.noise_scale_stderr < record.noise_scale < math.inf


def norm_spread(norms: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Returns the 5th, 50th, 95th and 100th percentile of each row.

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


class Thinner:
    """Gathers rows until enough of them are there, then gives the one that stands for them all."""

    __slots__ = ("_every", "_pending", "_thin")

    def __init__(self, every: int, thin: Callable[[str, Sequence[float]], float]) -> None:
        """Starts with nothing gathered.

        Args:
            every: Steps that one row stands for, at least 1.
            thin: Given a name and its values, oldest first, the value that stands for them.
        """
        self._every = every
        self._thin = thin
        self._pending: list[Mapping[str, float]] = []

    @property
    def holds(self) -> bool:
        """Whether there is anything that was not given yet."""
        return bool(self._pending)

    def add(self, row: Mapping[str, float], *, now: bool) -> Row:
        """Adds the row of one step, and returns the one to write at it; empty for none yet.

        Args:
            row: The values of the step.
            now: Whether to write at this step whatever the count says.
        """
        if self._every == 1:
            return dict(row)
        self._pending.append(row)
        return self.rest() if now or len(self._pending) >= self._every else {}

    def rest(self) -> Row:
        """Gives the row that stands for what is still held, empty when nothing is."""
        rows, self._pending = self._pending, []
        if len(rows) == 1:
            return dict(rows[0])
        names = dict.fromkeys(name for row in rows for name in row)
        return {
            name: self._thin(name, [row[name] for row in rows if name in row]) for name in names
        }


@dataclass(frozen=True, slots=True)
class Point:
    """All values of one step.

    Attributes:
        step: The x-axis.
        time: Wall time in seconds since the epoch.
        values: Tag to value.
    """

    step: int
    time: float
    values: Row


class OptimizerSeries:
    """What is written for one optimizer: its tags, its counters and what thinning still holds.

    Each optimizer after the first has groups of its own, ``gradwatch-SGD-1/`` and
    ``gradwatch-SGD-1_blocks/``.

    The newest point waits for the next one: at the end it goes out together with what thinning
    still holds, so that a step is never spread over two Events.
    """

    def __init__(self, label: str, *, every: int, block_every: int, step_scalars: bool) -> None:
        """Starts with nothing taken.

        Args:
            label: Empty for the first optimizer, the optimizer's label for each further one.
            every: Steps that one row of scalars stands for.
            block_every: Steps that one row of block norms stands for.
            step_scalars: Whether the step scalars are written at all.
        """
        # TensorBoard groups charts by the text before the first slash. The hyphen sorts the groups
        # behind those of the first optimizer; an underscore would put them in front.
        name = f"gradwatch-{label.replace('/', '_')}" if label else "gradwatch"
        self._group = f"{name}/"
        self._block_group = f"{name}_blocks/"
        self._step_scalars = step_scalars
        self._scalars = StepScalars()
        self._thin_scalars = Thinner(every, lambda name, values: STEP_SCALARS[name].thin(values))
        self._thin_blocks = Thinner(block_every, lambda _, values: largest(values))
        self._newest: Point | None = None

    def add(
        self,
        record: StepRecord,
        time: float,
        spread: Sequence[float],
        blocks: Mapping[str, float],
        *,
        notable: bool,
    ) -> Point | None:
        """Adds one step, and returns the point before it where that is to be written.

        Args:
            record: The step.
            time: Its wall time, in seconds since the epoch.
            spread: The four percentiles over the parameters' norms.
            blocks: Norm of each block that had a gradient.
            notable: Whether the step is written however the series are thinned.
        """
        scalars = self._scalars.of(record, spread)
        before = self._newest
        # TensorBoard would take it for a restart, and drop the points from this step on.
        if before is not None and record.global_step <= before.step:
            return None
        values: Row = {}
        if self._step_scalars:
            values |= _prefixed(self._group, self._thin_scalars.add(scalars, now=notable))
        values |= _prefixed(self._block_group, self._thin_blocks.add(blocks, now=notable))
        if record.nonfinite_parameters > 0:
            values[self._group + NONFINITE_EVENT] = float(record.nonfinite_parameters)
        self._newest = Point(record.global_step, time, values)
        return before

    def ready(self) -> Point | None:
        """Gives the newest point now, where thinning holds nothing that belongs to its step."""
        if self._newest is None or self._thin_scalars.holds or self._thin_blocks.holds:
            return None
        point, self._newest = self._newest, replace(self._newest, values={})
        return point

    def rest(self) -> Point | None:
        """Gives the newest point with all that thinning still holds; asked for at the end."""
        if self._newest is None:
            return None
        held = _prefixed(self._group, self._thin_scalars.rest())
        held |= _prefixed(self._block_group, self._thin_blocks.rest())
        return replace(self._newest, values=self._newest.values | held)

    def meaning(self, tag: str) -> str:
        """Says in one sentence what a tag of this optimizer means: TensorBoard shows it."""
        if tag.startswith(self._block_group):
            return _BLOCK_MEANING
        name = tag.removeprefix(self._group)
        return _NONFINITE_MEANING if name == NONFINITE_EVENT else STEP_SCALARS[name].meaning


def _prefixed(group: str, row: Mapping[str, float]) -> Row:
    return {group + name: value for name, value in row.items()}


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
        ]
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

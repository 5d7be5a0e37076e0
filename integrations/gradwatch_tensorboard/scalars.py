"""Scalars: the handful of numbers that stand for a step of one optimizer, their tags and charts.

:class:`OptimizerSeries` is what the writer holds of each optimizer. One row of scalars may stand
for several steps, and steps only ever rise.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.tensorboard.summary import custom_scalars

from gradwatch import StepRecord
from gradwatch.adapters import (
    REDUCTIONS,
    SCALARS,
    STEP_COLUMNS,
    Reduction,
    StepScalars,
    group_of,
    sentence,
)

QUANTILES = (0.05, 0.5, 0.95, 1.0)

Row = dict[str, float]
"""Name to value, for one step. A name may be missing in some steps."""


@dataclass(frozen=True, slots=True)
class DerivedScalar:
    """A number that the writer makes of several steps or parameters, and that is no column.

    Attributes:
        meaning: What TensorBoard shows when its user asks about the chart.
        reduction: Which value is written where one point stands for several steps.
    """

    meaning: str
    reduction: Reduction


DERIVED_SCALARS = {
    "clip_rate": DerivedScalar(
        "Share of clipped steps among the last 1,000 applied ones.", "newest"
    ),
    "norm_p05": DerivedScalar(
        "5th percentile over the parameters' finite norms before the clip.", "smallest"
    ),
    "norm_p50": DerivedScalar("Median over the same norms.", "median"),
    "norm_p95": DerivedScalar("95th percentile over the same norms.", "largest"),
    "norm_max": DerivedScalar("Largest of the same norms.", "largest"),
    "nonfinite_steps_total": DerivedScalar(
        "Steps with a NaN or Inf since this writer was made; no down-sampling loses it.", "newest"
    ),
    "skipped_steps_total": DerivedScalar(
        "Steps that were not applied since this writer was made; likewise.", "newest"
    ),
}
"""By name what :class:`StepSeries` adds to the columns that are logged."""

NONFINITE_EVENT = "nonfinite_event"

NONFINITE_MEANING = (
    "Parameters with a NaN or Inf gradient; written at such steps only, so that none is thinned "
    "away."
)
BLOCK_MEANING = "L2 norm over the parameters of this part of the model, before the clip."


@dataclass(slots=True)
class StepSeries:
    """Turns the records of one optimizer into the values of its step scalars.

    Attributes:
        nonfinite_steps: Steps so far with a NaN or an Inf in a gradient.
        skipped_steps: Steps so far that were not applied.
    """

    nonfinite_steps: int = field(default=0, init=False)
    skipped_steps: int = field(default=0, init=False)
    _columns: StepScalars = field(default_factory=StepScalars.for_tensorboard, init=False)
    _clipped: deque[bool] = field(default_factory=lambda: deque(maxlen=1_000), init=False)

    def of(self, record: StepRecord, spread: Sequence[float]) -> Row:
        """Returns the values of one step.

        Args:
            record: The step.
            spread: The four percentiles of :func:`norm_spread`.
        """
        self.nonfinite_steps += record.nonfinite_parameters > 0
        self.skipped_steps += record.outcome != "applied"
        if record.outcome == "applied":
            self._clipped.append(record.clipped)
        p05, p50, p95, maximum = spread
        derived = {
            "clip_rate": sum(self._clipped) / max(len(self._clipped), 1),
            "norm_p05": p05,
            "norm_p50": p50,
            "norm_p95": p95,
            "norm_max": maximum,
            "nonfinite_steps_total": float(self.nonfinite_steps),
            "skipped_steps_total": float(self.skipped_steps),
        }
        return self._columns.of(record) | derived


def reduce_scalar(name: str, values: Sequence[float]) -> float:
    """Reduces the values of several steps, oldest first, to the one that is written for them."""
    declared = DERIVED_SCALARS.get(name) or SCALARS[name]
    return REDUCTIONS[declared.reduction](values)


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
        name = group_of(label, first="")
        self._group = f"{name}/"
        self._block_group = f"{name}_blocks/"
        self._step_scalars = step_scalars
        self._scalars = StepSeries()
        self._thin_scalars = Thinner(every, reduce_scalar)
        self._thin_blocks = Thinner(block_every, lambda _, values: REDUCTIONS["largest"](values))
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
            return BLOCK_MEANING
        name = tag.removeprefix(self._group)
        if name == NONFINITE_EVENT:
            return NONFINITE_MEANING
        derived = DERIVED_SCALARS.get(name)
        return derived.meaning if derived is not None else sentence(STEP_COLUMNS[name])


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

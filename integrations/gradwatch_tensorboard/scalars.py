"""Scalars: the few numbers that TensorBoard shows per step and optimizer, their tags and charts.

The writer has one :class:`OptimizerSeries` per optimizer. One row of scalars may represent several
steps, and the steps of the rows only rise.
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
    STATISTICS,
    STEP_COLUMNS,
    Reduction,
    StepScalars,
    group_of,
    sentence,
)

QUANTILES = (0.05, 0.5, 0.95, 1.0)

Row = dict[str, float]
"""Scalar name to value, for one step. Not every step has every name."""


@dataclass(frozen=True, slots=True)
class DerivedScalar:
    """A scalar that the writer computes from several steps or parameters; no column of a step.

    Attributes:
        meaning: The description that TensorBoard shows for the chart.
        reduction: How the values of several steps become the one value that is written.
    """

    meaning: str
    reduction: Reduction


DERIVED_SCALARS = {
    "clip_rate": DerivedScalar(
        "Share of clipped steps among the last 1,000 applied ones of which it is known.", "newest"
    ),
    "norm_p05": DerivedScalar(
        "5th percentile over the parameters' finite norms before the clip.", "smallest"
    ),
    "norm_p50": DerivedScalar(
        "Median over the parameters' finite norms before the clip.", "median"
    ),
    "norm_p95": DerivedScalar(
        "95th percentile over the parameters' finite norms before the clip.", "largest"
    ),
    "norm_max": DerivedScalar(
        "Largest of the parameters' finite norms before the clip.", "largest"
    ),
    "nonfinite_steps_total": DerivedScalar(
        "Steps with a NaN or Inf since this writer was made; no down-sampling loses it.", "newest"
    ),
    "skipped_steps_total": DerivedScalar(
        "Steps that were not applied since this writer was made.", "newest"
    ),
}
"""Name to scalar: what :class:`StepSeries` adds to the logged columns of a step."""

_LOGGED = tuple(name for name, scalar in SCALARS.items() if scalar.tensorboard)

NONFINITE_EVENT = "nonfinite_event"

NONFINITE_MEANING = (
    "Parameters with a NaN or Inf gradient; written at such steps only, so that none is thinned "
    "away."
)
BLOCK_MEANING = "L2 norm over the parameters of this part of the model, before the clip."
STATISTIC_MEANING = "{meaning}; of the parameter of this part where it is largest in magnitude."


@dataclass(slots=True)
class StepSeries:
    """Turns the records of one optimizer into the values of its step scalars.

    Attributes:
        nonfinite_steps: Number of steps so far with a NaN or Inf in a gradient.
        skipped_steps: Number of steps so far that were not applied.
    """

    nonfinite_steps: int = field(default=0, init=False)
    skipped_steps: int = field(default=0, init=False)
    _columns: StepScalars = field(default_factory=lambda: StepScalars(_LOGGED), init=False)
    _clipped: deque[bool] = field(default_factory=lambda: deque(maxlen=1_000), init=False)

    def of(self, record: StepRecord, spread: Sequence[float]) -> Row:
        """Counts one step and returns its values.

        Args:
            record: The step; call once per step, in order, because totals are counted here.
            spread: The row of :func:`norm_spread` for this step: four percentiles.
        """
        self.nonfinite_steps += record.nonfinite_parameters > 0
        self.skipped_steps += record.outcome != "applied"
        if record.outcome == "applied" and record.clipped is not None:
            self._clipped.append(record.clipped)
        p05, p50, p95, maximum = spread
        derived = {
            "norm_p05": p05,
            "norm_p50": p50,
            "norm_p95": p95,
            "norm_max": maximum,
            "nonfinite_steps_total": float(self.nonfinite_steps),
            "skipped_steps_total": float(self.skipped_steps),
        }
        return self._columns.of(record) | self._clip_rate(record) | derived

    def _clip_rate(self, record: StepRecord) -> Row:
        if record.clipped is None and not self._clipped:
            return {}
        return {"clip_rate": sum(self._clipped) / max(len(self._clipped), 1)}


def reduce_scalar(name: str, values: Sequence[float]) -> float:
    """Reduces the values of several steps, oldest first, to the one value that is written."""
    declared = DERIVED_SCALARS.get(name) or SCALARS[name]
    return REDUCTIONS[declared.reduction](values)


def reduce_block(name: str, values: Sequence[float]) -> float:
    """Reduces the values of a block over several steps to the one that is written: the largest."""
    if name.startswith("blocks/"):
        return REDUCTIONS["largest"](values)
    return max(values, key=abs)  # a mean may be negative, and none of them is NaN


def statistic_meaning(name: str) -> str:
    """Returns the description that TensorBoard shows for the values of a statistic."""
    known = STATISTICS.get(name)
    meaning = known.meaning if known is not None else name
    return STATISTIC_MEANING.format(meaning=f"{meaning[:1].upper()}{meaning[1:]}")


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
    """Collects a fixed number of rows, then merges them into one row to be written."""

    __slots__ = ("_every", "_pending", "_thin")

    def __init__(self, every: int, thin: Callable[[str, Sequence[float]], float]) -> None:
        """Starts without rows.

        Args:
            every: Number of steps that one written row represents, at least 1.
            thin: Takes a name and its values, oldest first, and returns the value to write.
        """
        self._every = every
        self._thin = thin
        self._pending: list[Mapping[str, float]] = []

    @property
    def holds(self) -> bool:
        """Whether rows are waiting to be written."""
        return bool(self._pending)

    def add(self, row: Mapping[str, float], *, now: bool) -> Row:
        """Adds the row of one step, and returns the row to write now; empty if none is due.

        With ``now``, a row is due at this step even if fewer than ``every`` rows are waiting.
        """
        if self._every == 1:
            return dict(row)
        self._pending.append(row)
        return self.rest() if now or len(self._pending) >= self._every else {}

    def rest(self) -> Row:
        """Merges the rows that still wait and returns the result; empty if none wait."""
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
        step: The step on the x-axis, a ``global_step``.
        time: Wall time, in seconds since 1970.
        values: Tag to value.
    """

    step: int
    time: float
    values: Row


class OptimizerSeries:
    """The scalars and block norms of one optimizer: their tags, counters and thinning.

    The first optimizer has the groups ``gradwatch/``, ``gradwatch_blocks/`` and one for each
    statistic, ``gradwatch_max/``. Each further one has its own, ``gradwatch-SGD-1_blocks/`` say.

    The newest point is held back until the next one arrives. At the end it is written together with
    the rows that still wait in the thinners, so that a step is never spread over two Events.
    """

    def __init__(self, label: str, *, every: int, block_every: int, step_scalars: bool) -> None:
        """Starts an empty series.

        Args:
            label: The optimizer's label; empty for the first optimizer.
            every: Number of steps that one row of scalars represents.
            block_every: Number of steps that one row of block norms represents.
            step_scalars: Whether the step scalars are written at all.
        """
        name = group_of(label, first="")
        self._group = f"{name}/"
        self._block_group = f"{name}_"  # of the norms, "gradwatch_blocks/", and of the statistics
        self._step_scalars = step_scalars
        self._scalars = StepSeries()
        self._thin_scalars = Thinner(every, reduce_scalar)
        self._thin_blocks = Thinner(block_every, reduce_block)
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
        """Adds one step, and returns the previous point, which is now ready to be written.

        Args:
            record: The step.
            time: Wall time of the step, in seconds since 1970.
            spread: The row of :func:`norm_spread` for this step.
            blocks: What :class:`~gradwatch.adapters.BlockScalars` has for the step.
            notable: Whether to write the step even if thinning would not.
        """
        scalars = self._scalars.of(record, spread)
        before = self._newest
        # A step that does not rise is dropped: TensorBoard would take it for a restart, and hide
        # the points from this step on.
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
        """Returns the newest point early, unless rows that belong to its step wait in a thinner."""
        if self._newest is None or self._thin_scalars.holds or self._thin_blocks.holds:
            return None
        point, self._newest = self._newest, replace(self._newest, values={})
        return point

    def rest(self) -> Point | None:
        """Returns the newest point with the rows that still wait; called once, at the end."""
        if self._newest is None:
            return None
        held = _prefixed(self._group, self._thin_scalars.rest())
        held |= _prefixed(self._block_group, self._thin_blocks.rest())
        return replace(self._newest, values=self._newest.values | held)

    def meaning(self, tag: str) -> str:
        """Returns the one-sentence description that TensorBoard shows for a tag."""
        if not tag.startswith(self._group):
            kind = tag.removeprefix(self._block_group).partition("/")[0]
            return BLOCK_MEANING if kind == "blocks" else statistic_meaning(kind)
        name = tag.removeprefix(self._group)
        if name == NONFINITE_EVENT:
            return NONFINITE_MEANING
        derived = DERIVED_SCALARS.get(name)
        return derived.meaning if derived is not None else sentence(STEP_COLUMNS[name])


def _prefixed(group: str, row: Mapping[str, float]) -> Row:
    return {group + name: value for name, value in row.items()}


_SPREAD = ["gradwatch/norm_p50", "gradwatch/norm_p05", "gradwatch/norm_p95"]


def chart_layout(*, step_scalars: bool, accumulates: bool = False) -> Any:
    """Lays out the charts that combine several scalars, for the Custom Scalars dashboard.

    Args:
        step_scalars: Whether the step scalars are written; the spread of the norms needs them.
        accumulates: Whether steps have several micro-batches or a noise scale, and so a chart that
            compares the two.

    Returns:
        A ``Summary`` with the tag that the dashboard reads. Multiline charts select their tags by
        regular expressions, so they include further optimizers as soon as these appear.
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

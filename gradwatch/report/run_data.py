"""What reports and plots read of a run: steps by optimizer, and numbers of the parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.record.columns import (
    Array,
    Column,
    Source,
    Span,
    Table,
    array_of,
    events_frame,
    labels_in,
    safe_text,
)
from gradwatch.record.records import Layout
from gradwatch.report.thresholds import Thresholds

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True)
class OptimizerArrays:
    """The steps of one optimizer, oldest first.

    Attributes:
        optimizer: Its label.
        step: int64 ``[steps]``.
        columns: By name of a column of ``History.steps()`` an array ``[steps]``.
        applied: bool ``[steps]``.
        by_scaler: bool ``[steps]``: whether a ``GradScaler`` left the step out.
    """

    optimizer: str
    step: Array
    columns: Mapping[str, Array]
    applied: Array
    by_scaler: Array

    def __len__(self) -> int:
        return len(self.step)

    def __getitem__(self, name: str) -> Array:
        return self.columns[name]

    @property
    def nonfinite(self) -> Array:
        """Bool ``[steps]``: whether a gradient, or only the total norm, was NaN or Inf."""
        return (self["nonfinite_parameters"] > 0) | ~np.isfinite(self["grad_norm"])


def read_steps(
    source: Source, columns: Iterable[str], span: Span | None = None
) -> list[OptimizerArrays]:
    """Reads the steps of each optimizer.

    Args:
        source: The run.
        columns: Columns of numbers of ``History.steps()``.
        span: Which steps; all if left out.

    Returns:
        In the order in which the optimizers first stepped.
    """
    return by_optimizer(source.steps(("step", "optimizer", "outcome", *columns), span or Span()))


def by_optimizer(table: Table) -> list[OptimizerArrays]:
    """Parts steps by optimizer, in the order in which each first comes.

    Args:
        table: ``step``, ``optimizer``, ``outcome`` and columns of numbers.
    """
    optimizer = labels_in(table["optimizer"])
    codes, first = np.unique(optimizer.codes, return_index=True)
    applied, by_scaler = (
        equals(table["outcome"], outcome) for outcome in ("applied", "skipped_scaler")
    )
    numbers = {n: array_of(table[n]) for n in table if n not in ("step", "optimizer", "outcome")}
    parts = []
    # A folder codes labels in the order of its parts, which need not be that of the steps.
    for code in codes[np.argsort(first)]:
        # A view where there is one optimizer: a million steps of 13 columns are 100 MB.
        mine = optimizer.codes == code if len(codes) > 1 else slice(None)
        parts.append(
            OptimizerArrays(
                safe_text(optimizer.values[code]),
                array_of(table["step"])[mine],
                {name: array[mine] for name, array in numbers.items()},
                applied[mine],
                by_scaler[mine],
            )
        )
    return parts


def equals(column: Column, text: str) -> Array:
    """Compares a column of strings with one; bool ``[rows]``."""
    labels = labels_in(column)
    # By code: a million comparisons of strings take longer than reading them.
    same: Array = np.array([value == text for value in labels.values], bool)[labels.codes]
    return same


@dataclass(frozen=True, slots=True)
class ParameterSample:
    """Numbers per parameter of some steps.

    Attributes:
        steps: int64 ``[steps]``, rising.
        present: bool ``[steps, parameters]``: whether there was a gradient.
        columns: By column of ``History.parameters()`` float64 like ``present``; NaN where there was
            no gradient, or the statistic was not taken.
    """

    steps: Array
    present: Array
    columns: Mapping[str, Array]

    def __getitem__(self, name: str) -> Array:
        return self.columns[name]


ROWS_AT_ONCE = 2_000_000
"""Rows of ``History.parameters()`` that are held in memory at once."""

Range = tuple[int, int]
"""First step and one after the last."""


def spread_steps(first: int, last: int, most: int, pieces: int) -> list[Range]:
    """Spreads ranges of steps evenly over a run.

    Args:
        first: The first step of the run.
        last: The last one.
        most: How many steps the ranges hold in all, at most.
        pieces: How many ranges.

    Returns:
        The ranges; a single one where it covers the run.
    """
    if last - first + 1 <= most:
        return [(first, last + 1)]
    length = max(1, most // pieces)
    starts = np.linspace(first, last + 1 - length, pieces).astype(int).tolist()
    return [(start, start + length) for start in starts]


def read_blocks(
    source: Source, columns: Sequence[str], ranges: Iterable[Range]
) -> Iterator[ParameterSample]:
    """Reads every step of ranges, in blocks that fit into memory.

    Args:
        source: The run.
        columns: Columns of ``History.parameters()``.
        ranges: The steps. One without a record has a row in which no gradient is present.
    """
    parameters = len(source.layout().names)
    length = max(1, ROWS_AT_ONCE // max(1, parameters))
    for start, stop in ranges:
        for first in range(start, stop, length):
            steps = np.arange(first, min(first + length, stop))
            table = source.parameters(None, columns, Span(first, int(steps[-1]) + 1))
            yield _dense(table, columns, steps, parameters)


def _dense(table: Table, columns: Sequence[str], steps: Array, parameters: int) -> ParameterSample:
    # Every source codes a parameter by its index in the layout, so that no name is looked up.
    where = (array_of(table["step"]) - steps[0], labels_in(table["parameter"]).codes)
    present = np.zeros((len(steps), parameters), bool)
    present[where] = True
    planes = {name: np.full(present.shape, np.nan) for name in columns}
    for name, plane in planes.items():
        plane[where] = array_of(table[name])
    return ParameterSample(steps, present, planes)


def read_sample(source: Source, columns: Sequence[str], ranges: Iterable[Range]) -> ParameterSample:
    """Reads every step of ranges as one sample; see :func:`read_blocks`."""
    blocks = list(read_blocks(source, columns, ranges))
    # In front of the blocks, for without a range there is none to tell the shape.
    none = np.empty((0, len(source.layout().names)))
    return ParameterSample(
        np.concatenate([np.empty(0, np.int64), *(block.steps for block in blocks)]),
        np.concatenate([none.astype(bool), *(block.present for block in blocks)]),
        {name: np.concatenate([none, *(block[name] for block in blocks)]) for name in columns},
    )


STEP_NUMBERS = (
    "weight",
    "grad_norm",
    "grad_norm_clipped",
    "grad_norm_local",
    "clip_threshold",
    "clipped",
    "nonfinite_parameters",
    "loss",
    "lr",
    "loss_scale",
    "noise_scale",
    "noise_scale_stderr",
)
"""What the rules look at of the steps."""

STATISTICS = ("zeros", "update_ratio")
"""Statistics that a rule looks at, where they were taken."""

MOST_NEWEST_STEPS = 4_096
"""Steps at the end of a run in which a statistic is looked for that the sample has missed."""


@dataclass(frozen=True, slots=True)
class RunData:
    """What the rules of a report know of a run.

    Attributes:
        optimizers: Its steps, by optimizer.
        layout: Its parameters.
        sample: Norms and :data:`STATISTICS` of the parameters in some steps. A statistic that was
            found at the end of the run only has rows of its own.
        events: All events, as ``History.events()`` returns them.
    """

    optimizers: Sequence[OptimizerArrays]
    layout: Layout
    sample: ParameterSample
    events: pd.DataFrame

    def __len__(self) -> int:
        return max(map(len, self.optimizers), default=0)

    @property
    def sizes(self) -> Array:
        """Elements per parameter, at least 1; empty where the shapes are not known."""
        return np.array([max(1, prod(shape)) for shape in self.layout.shapes], float)

    @property
    def matrices(self) -> Array:
        """Whether each parameter has two dimensions or more: the weights of layers."""
        return np.array([len(shape) >= 2 for shape in self.layout.shapes], bool)

    def events_of(self, optimizer: str, kinds: Sequence[str]) -> pd.DataFrame:
        """Selects the events of some kinds that came in steps of an optimizer."""
        events = self.events
        wanted = events["kind"].isin(list(kinds)) & (events["optimizer"] == optimizer)
        chosen: pd.DataFrame = events[wanted]
        return chosen


def read_run(source: Source, limits: Thresholds) -> RunData | None:
    """Reads what the rules need.

    Args:
        source: The run.
        limits: How much of the parameters to read.

    Returns:
        The run; None where it has no step.
    """
    optimizers = read_steps(source, STEP_NUMBERS)
    if not optimizers:
        return None
    sample = _sample(source, *first_and_last(optimizers), limits)
    return RunData(optimizers, source.layout(), sample, events_frame(source.events()))


def first_and_last(optimizers: Sequence[OptimizerArrays]) -> Range:
    """Returns the first and the last step of all optimizers."""
    first = min(int(steps.step.min()) for steps in optimizers)
    return first, max(int(steps.step.max()) for steps in optimizers)


def _sample(source: Source, first: int, last: int, limits: Thresholds) -> ParameterSample:
    """Reads some ranges of steps, so that a million steps take about as long as a thousand."""
    parameters = max(1, len(source.layout().names))
    taken = source.statistics()
    wanted = [name for name in STATISTICS if name in taken]
    allowed = limits.sample_rows // (limits.sample_blocks * parameters)
    most = limits.sample_blocks * max(2, min(limits.sample_steps, allowed))
    ranges = spread_steps(first, last, most, limits.sample_blocks)
    sample = _recorded(read_sample(source, ["grad_norm", *wanted], ranges))
    missed = [name for name in wanted if not np.isfinite(sample[name]).any()]
    if not missed:
        return sample
    # Statistics of every so many steps may lie between the ranges.
    reach = max(2, min(MOST_NEWEST_STEPS, limits.sample_rows // parameters))
    newest = read_sample(source, missed, [(max(first, last + 1 - reach), last + 1)])
    return ParameterSample(sample.steps, sample.present, {**sample.columns, **newest.columns})


def _recorded(sample: ParameterSample) -> ParameterSample:
    """Drops steps without any gradient, which would shift the halves that a rule compares."""
    kept = sample.present.any(axis=1)
    planes = {name: plane[kept] for name, plane in sample.columns.items()}
    return ParameterSample(sample.steps[kept], sample.present[kept], planes)


def medians(matrix: Array) -> Array:
    """Returns the median of the finite numbers of each column.

    Args:
        matrix: float ``[rows, columns]``.

    Returns:
        float64 ``[columns]``, NaN where there is none.
    """
    sound = np.where(np.isfinite(matrix), matrix, np.nan)
    # nanmedian warns of columns without a number.
    there = np.isfinite(sound).any(axis=0)
    result = np.full(matrix.shape[1], np.nan)
    if there.any():
        result[there] = np.nanmedian(sound[:, there], axis=0)
    return result

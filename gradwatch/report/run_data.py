"""Reads what reports and plots need of a run: steps by optimizer, and numbers per parameter."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from gradwatch.record.columns import (
    ROWS_AT_ONCE,
    Array,
    Column,
    Labels,
    Source,
    Span,
    Table,
    array_of,
    labels_in,
    numbers_of,
    safe_text,
)
from gradwatch.record.explanation import Explanation
from gradwatch.record.records import Event, Layout
from gradwatch.report.parameter_groups import GroupRate, group_rates
from gradwatch.report.thresholds import Thresholds


@dataclass(frozen=True, slots=True)
class OptimizerArrays:
    """The steps of one optimizer, oldest first.

    Attributes:
        optimizer: Label of the optimizer.
        step: int64 ``[steps]``.
        columns: Number columns of ``History.steps()`` by name, each an array ``[steps]``;
            ``clipped`` is 1, 0, or NaN where it is not known.
        applied: bool ``[steps]``.
        by_scaler: bool ``[steps]``: whether a ``GradScaler`` skipped the step.
        group_lr: The learning rates of all parameter groups as JSON, one text per step, empty where
            there is one group; None if they were not read.
    """

    optimizer: str
    step: Array
    columns: Mapping[str, Array]
    applied: Array
    by_scaler: Array
    group_lr: Labels | None = None

    def __len__(self) -> int:
        return len(self.step)

    def __getitem__(self, name: str) -> Array:
        return self.columns[name]

    @property
    def clip_known(self) -> Array:
        """Bool ``[steps]``: whether a step was applied and it is known if it was clipped."""
        known: Array = self.applied & ~np.isnan(self["clipped"])
        return known

    @property
    def nonfinite(self) -> Array:
        """Bool ``[steps]``: whether a gradient, or only the total norm, was NaN or Inf."""
        # A norm that is not known, as where ranks no longer exchange theirs, is NaN as well.
        unknown = np.isnan(self["grad_norm"]) & np.isnan(self["clipped"])
        return (self["nonfinite_parameters"] > 0) | ~(np.isfinite(self["grad_norm"]) | unknown)


_NO_NUMBERS = ("step", "optimizer", "outcome", "group_lr")


def read_steps(
    source: Source, columns: Iterable[str], span: Span | None = None
) -> list[OptimizerArrays]:
    """Reads the steps of each optimizer.

    Returns:
        One entry per optimizer, in the order of their first steps; ``columns`` are number columns
        of ``History.steps()``, or ``group_lr``.
    """
    return by_optimizer(source.steps(("step", "optimizer", "outcome", *columns), span or Span()))


def by_optimizer(table: Table) -> list[OptimizerArrays]:
    """Splits steps by optimizer, in the order in which the optimizers first appear.

    Args:
        table: ``step``, ``optimizer``, ``outcome``, number columns and perhaps ``group_lr``.
    """
    optimizer = labels_in(table["optimizer"])
    codes, first = np.unique(optimizer.codes, return_index=True)
    applied, by_scaler = (
        equals(table["outcome"], outcome) for outcome in ("applied", "skipped_scaler")
    )
    numbers = {n: numbers_of(table[n]) for n in table if n not in _NO_NUMBERS}
    rates = labels_in(table["group_lr"]) if "group_lr" in table else None
    parts = []
    # Sort by first row: a folder numbers the labels in the order of its parts, not of the steps.
    for code in codes[np.argsort(first)]:
        # With one optimizer a view avoids a copy: a million steps of 13 columns are 100 MB.
        mine = optimizer.codes == code if len(codes) > 1 else slice(None)
        parts.append(
            OptimizerArrays(
                safe_text(optimizer.values[code]),
                array_of(table["step"])[mine],
                {name: array[mine] for name, array in numbers.items()},
                applied[mine],
                by_scaler[mine],
                None if rates is None else Labels(rates.values, rates.codes[mine]),
            )
        )
    return parts


def equals(column: Column, text: str) -> Array:
    """Tells which rows of a string column equal a text: bool ``[rows]``."""
    labels = labels_in(column)
    # Compare each label once: comparing a million strings takes longer than reading them.
    same: Array = np.array([value == text for value in labels.values], bool)[labels.codes]
    return same


@dataclass(frozen=True, slots=True)
class ParameterSample:
    """Numbers per parameter for some of the steps.

    Attributes:
        steps: int64 ``[steps]``, ascending.
        present: bool ``[steps, parameters]``: whether there was a gradient.
        columns: Columns of ``History.parameters()`` by name, each float64 ``[steps, parameters]``;
            NaN if there was no gradient, or the statistic was not measured.
    """

    steps: Array
    present: Array
    columns: Mapping[str, Array]

    def __getitem__(self, name: str) -> Array:
        return self.columns[name]


Range = tuple[int, int]
"""The first step, and the step after the last one."""


def spread_steps(first: int, last: int, most: int, pieces: int) -> list[Range]:
    """Spreads ranges of steps evenly over a run.

    Args:
        first: The first step of the run.
        last: The last step of the run, included.
        most: Maximum number of steps in all ranges together.
        pieces: Number of ranges.

    Returns:
        The ranges, or a single one if the whole run fits.
    """
    if last - first + 1 <= most:
        return [(first, last + 1)]
    length = max(1, most // pieces)
    starts = np.linspace(first, last + 1 - length, pieces).astype(int).tolist()
    return [(start, start + length) for start in starts]


def read_blocks(
    source: Source, columns: Sequence[str], ranges: Iterable[Range]
) -> Iterator[ParameterSample]:
    """Reads every step of the ranges, in blocks that fit into memory.

    Args:
        source: A live run or a run folder.
        columns: Columns of ``History.parameters()``.
        ranges: Steps to read. A step without a record gets a row in which no gradient is present.
    """
    parameters = len(source.layout().names)
    length = max(1, ROWS_AT_ONCE // max(1, parameters))
    for start, stop in ranges:
        for first in range(start, stop, length):
            steps = np.arange(first, min(first + length, stop))
            table = source.parameters(None, columns, Span(first, int(steps[-1]) + 1))
            yield _dense(table, columns, steps, parameters)


def _dense(table: Table, columns: Sequence[str], steps: Array, parameters: int) -> ParameterSample:
    # In every source the code of a parameter is its index in the layout: no need to look up names.
    where = (array_of(table["step"]) - steps[0], labels_in(table["parameter"]).codes)
    present = np.zeros((len(steps), parameters), bool)
    present[where] = True
    planes = {name: np.full(present.shape, np.nan) for name in columns}
    for name, plane in planes.items():
        plane[where] = array_of(table[name])
    return ParameterSample(steps, present, planes)


def read_sample(source: Source, columns: Sequence[str], ranges: Iterable[Range]) -> ParameterSample:
    """Reads every step of the ranges as one sample; see :func:`read_blocks`."""
    blocks = list(read_blocks(source, columns, ranges))
    # Concatenate to empty arrays: without ranges there is no block that would give the shape.
    none = np.empty((0, len(source.layout().names)))
    return ParameterSample(
        np.concatenate([np.empty(0, np.int64), *(block.steps for block in blocks)]),
        np.concatenate([none.astype(bool), *(block.present for block in blocks)]),
        {name: np.concatenate([none, *(block[name] for block in blocks)]) for name in columns},
    )


STEP_NUMBERS = (
    "micro_batches",
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
    "noise_scale_low",
    "noise_scale_high",
    "discarded",
)
"""The step columns that rules use."""

STATISTICS = ("zeros", "update_ratio")
"""The statistics that rules use, if they were measured."""

MOST_NEWEST_STEPS = 4_096
"""If the sample missed a statistic, at most this many of the newest steps are searched for it."""


_EVENT_TEXTS = ("kind", "parameter", "module", "message", "optimizer")


@dataclass(frozen=True, slots=True)
class RunData:
    """What the rules of a report know about a run.

    Attributes:
        optimizers: The steps of the run, one entry per optimizer.
        layout: Names, modules and shapes of the parameters.
        sample: Norms and :data:`STATISTICS` of the parameters in some steps. A statistic that was
            found only at the end of the run has rows of its own.
        events: All events, oldest first; their texts are those of ``History.events()``.
        explanations: Those of bad steps, oldest first.
        group_rates: The newest parameter groups of all optimizers; empty if there is only one group
            in the run, or none is known.
    """

    optimizers: Sequence[OptimizerArrays]
    layout: Layout
    sample: ParameterSample
    events: Sequence[Event]
    group_rates: Sequence[GroupRate] = ()
    explanations: Sequence[Explanation] = ()

    def __len__(self) -> int:
        return max(map(len, self.optimizers), default=0)

    @property
    def sizes(self) -> Array:
        """Number of elements of each parameter, at least 1; empty if the shapes are unknown."""
        return np.array([max(1, prod(shape)) for shape in self.layout.shapes], float)

    @property
    def matrices(self) -> Array:
        """Tells which parameters have two dimensions or more: the weights of layers."""
        return np.array([len(shape) >= 2 for shape in self.layout.shapes], bool)

    def events_of(self, optimizer: str, kinds: Container[str]) -> list[Event]:
        """Returns the events of the given kinds in the steps of an optimizer."""
        return [one for one in self.events if one.kind in kinds and one.optimizer == optimizer]

    def explanations_of(self, optimizer: str, kinds: Sequence[str]) -> list[Explanation]:
        """Returns the explanations of the given kinds in the steps of an optimizer, by step."""
        wanted = [
            one
            for one in self.explanations
            if one.kind in kinds and safe_text(one.optimizer) == optimizer
        ]
        return sorted(wanted, key=lambda one: one.step)


def read_run(source: Source, limits: Thresholds) -> RunData | None:
    """Reads what the rules need; None if the run has neither a step nor an event yet.

    The ``sample_*`` limits say how many numbers per parameter are read.
    """
    several = any(len(one.names) > 1 for one in source.groups())
    columns = (*STEP_NUMBERS, "group_lr") if several else STEP_NUMBERS
    optimizers, events = read_steps(source, columns), source.events()
    if optimizers:
        sample = _sample(source, *first_and_last(optimizers), limits)
    elif events:
        sample = read_sample(source, ["grad_norm"], ())
    else:
        return None
    return RunData(
        optimizers,
        source.layout(),
        sample,
        [_with_safe_texts(event) for event in events],
        group_rates(source),
        source.explanations(),
    )


def _with_safe_texts(event: Event) -> Event:
    texts: dict[str, Any] = {name: safe_text(getattr(event, name)) for name in _EVENT_TEXTS}
    unsafe = any(getattr(event, name) != text for name, text in texts.items())
    return replace(event, **texts) if unsafe else event


def first_and_last(optimizers: Sequence[OptimizerArrays]) -> Range:
    """Returns the first and the last step of all optimizers."""
    first = min(int(steps.step.min()) for steps in optimizers)
    return first, max(int(steps.step.max()) for steps in optimizers)


def _sample(source: Source, first: int, last: int, limits: Thresholds) -> ParameterSample:
    """Reads only some ranges of steps: a million steps take about as long as a thousand."""
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
    # A statistic measured only every so many steps may lie between the ranges.
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
        float64 ``[columns]``; NaN if a column has no finite number.
    """
    sound = np.where(np.isfinite(matrix), matrix, np.nan)
    # Leave out columns without a number: np.nanmedian warns about them.
    there = np.isfinite(sound).any(axis=0)
    result = np.full(matrix.shape[1], np.nan)
    if there.any():
        result[there] = np.nanmedian(sound[:, there], axis=0)
    return result

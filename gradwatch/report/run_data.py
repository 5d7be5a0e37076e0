"""What the rules read of a run: steps as arrays, sampled parameters, and the words for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gradwatch.record.columns import safe_text
from gradwatch.record.records import Layout
from gradwatch.report.finding import MOST_STEPS
from gradwatch.report.thresholds import Thresholds

if TYPE_CHECKING:
    import pandas as pd


Array = NDArray[Any]

NUMBERS = (
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
)
COLUMNS = ("optimizer", "outcome", *NUMBERS)
"""What a report reads of the steps."""


@dataclass(frozen=True, slots=True)
class OptimizerArrays:
    """The steps of one optimizer, oldest first.

    Attributes:
        optimizer: Its label.
        step: int64 ``[steps]``.
        columns: By name of :data:`NUMBERS` an array ``[steps]``.
        applied: bool ``[steps]``.
        by_scaler: bool ``[steps]``: whether the scaler left the step out.
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
    def bad(self) -> Array:
        """Whether a step's gradients were not finite, and that is no affair of the scaler's."""
        unsound = (self["nonfinite_parameters"] > 0) | ~np.isfinite(self["grad_norm"])
        return unsound & ~self.by_scaler

    @property
    def finite(self) -> Array:
        """The finite norms, oldest first."""
        norms = self["grad_norm"]
        return norms[np.isfinite(norms)]


def tracks_of(frame: pd.DataFrame) -> list[OptimizerArrays]:
    """Takes the steps apart by optimizer.

    Args:
        frame: ``History.steps(columns=COLUMNS)``.
    """
    labels = frame["optimizer"]
    names = [str(name) for name in labels.unique()]
    if len(names) == 1:
        return [_track(names[0], frame)]
    return [_track(name, frame[labels == name]) for name in names]


def _track(name: str, frame: pd.DataFrame) -> OptimizerArrays:
    outcome = frame["outcome"]
    return OptimizerArrays(
        name,
        frame.index.to_numpy(),
        {column: frame[column].to_numpy() for column in NUMBERS},
        (outcome == "applied").to_numpy(bool),
        (outcome == "skipped_scaler").to_numpy(bool),
    )


STATISTICS = ("zeros", "update_ratio")
"""Statistics that a rule looks at, where they were taken."""

_REACH = 4_096


@dataclass(frozen=True, slots=True)
class ParameterSample:
    """What was read of the parameters.

    Attributes:
        steps: int64 ``[steps]``, rising.
        present: bool ``[steps, parameters]``: whether there was a gradient.
        norms: float64 like ``present``: norms before the clip; NaN where there was none.
        statistics: Further ones by name, like ``norms``; NaN where they were not taken.
    """

    steps: Array
    present: Array
    norms: Array
    statistics: Mapping[str, Array]

    def typical(self) -> Array:
        """Takes the median of the finite norms of each parameter.

        Returns:
            float64 ``[parameters]``, NaN where there is none.
        """
        return medians(self.norms)


def medians(matrix: Array) -> Array:
    """Takes the median of the finite numbers of each column.

    Args:
        matrix: float ``[rows, columns]``.

    Returns:
        float64 ``[columns]``, NaN where there is none.
    """
    sound = np.where(np.isfinite(matrix), matrix, np.nan)
    there = np.isfinite(sound).any(axis=0)
    result = np.full(matrix.shape[1], np.nan)
    if there.any():
        result[there] = np.nanmedian(sound[:, there], axis=0)
    return result


def ranges(first: int, last: int, limits: Thresholds, parameters: int) -> list[tuple[int, int]]:
    """Spreads ranges of steps over a run.

    Args:
        first: Its first step.
        last: Its last step.
        limits: How many ranges, how long, and how many rows at most.
        parameters: Rows per step.

    Returns:
        First step and one after the last of each; a single range where they cover the run.
    """
    allowed = limits.sample_rows // (limits.sample_blocks * max(parameters, 1))
    length = max(2, min(limits.sample_steps, allowed))
    if last - first + 1 <= limits.sample_blocks * length:
        return [(first, last + 1)]
    starts = np.linspace(first, last + 1 - length, limits.sample_blocks).astype(int)
    return [(int(start), int(start) + length) for start in starts]


def read_sample(records: Records, first: int, last: int, limits: Thresholds) -> ParameterSample:
    """Reads a sample of a run.

    Args:
        records: The run.
        first: Its first step.
        last: Its last step.
        limits: How much to read.
    """
    import pandas as pd

    names = [safe_text(name) for name in records.layout.names]
    known = records.parameters(start=0, stop=0).columns
    wanted = [name for name in STATISTICS if name in known]
    frames = [
        records.parameters(columns=["grad_norm", *wanted], start=start, stop=stop)
        for start, stop in ranges(first, last, limits, len(names))
    ]
    sample = _matrices(pd.concat(frames, ignore_index=True), names, wanted)
    missed = [name for name in wanted if not np.isfinite(sample.statistics[name]).any()]
    if not missed:
        return sample
    # Statistics of every so many steps may lie between the ranges.
    reach = max(2, min(_REACH, limits.sample_rows // max(len(names), 1)))
    newest = records.parameters(columns=["grad_norm", *missed], start=last + 1 - reach)
    late = _matrices(newest, names, missed)
    return ParameterSample(
        sample.steps, sample.present, sample.norms, {**sample.statistics, **late.statistics}
    )


def _matrices(
    frame: pd.DataFrame, names: Sequence[str], statistics: Sequence[str]
) -> ParameterSample:
    import pandas as pd

    steps, rows = np.unique(frame["step"].to_numpy(), return_inverse=True)
    columns = pd.Index(names).get_indexer(pd.Index(frame["parameter"]))
    shape = (len(steps), len(names))
    present = np.zeros(shape, bool)
    present[rows, columns] = True

    def matrix(name: str) -> Array:
        result = np.full(shape, np.nan)
        result[rows, columns] = frame[name].to_numpy()
        return result

    return ParameterSample(
        steps, present, matrix("grad_norm"), {name: matrix(name) for name in statistics}
    )


class Records(Protocol):
    """The part of :class:`gradwatch.History` that a report reads."""

    @property
    def layout(self) -> Layout:
        """The parameters."""

    def steps(
        self,
        columns: Iterable[str] | None = None,
        *,
        start: int | None = None,
        stop: int | None = None,
    ) -> pd.DataFrame:
        """See :meth:`gradwatch.History.steps`."""

    def parameters(
        self,
        names: Any = None,
        *,
        columns: Iterable[str] | None = None,
        start: int | None = None,
        stop: int | None = None,
    ) -> pd.DataFrame:
        """See :meth:`gradwatch.History.parameters`."""

    def events(self) -> pd.DataFrame:
        """See :meth:`gradwatch.History.events`."""


@dataclass(frozen=True, slots=True)
class RunData:
    """What was read of a run.

    Attributes:
        tracks: Its steps, by optimizer.
        layout: Its parameters.
        sample: Per-parameter numbers of some steps.
        events: All events.
    """

    tracks: Sequence[OptimizerArrays]
    layout: Layout
    sample: ParameterSample
    events: pd.DataFrame

    def __len__(self) -> int:
        return max(map(len, self.tracks), default=0)

    @property
    def sizes(self) -> Array:
        """Elements per parameter, at least 1; empty where the shapes are not known."""
        return np.array([max(1, prod(shape)) for shape in self.layout.shapes], float)

    @property
    def matrices(self) -> Array:
        """Whether each parameter has two dimensions or more: the weights of layers."""
        return np.array([len(shape) >= 2 for shape in self.layout.shapes], bool)

    def events_of(self, track: OptimizerArrays, kinds: Sequence[str]) -> pd.DataFrame:
        """Selects events.

        Args:
            track: Whose.
            kinds: Of which kinds.
        """
        events = self.events
        wanted = events["kind"].isin(list(kinds)) & (events["optimizer"] == track.optimizer)
        chosen: pd.DataFrame = events[wanted]
        return chosen


def read_run(records: Records, limits: Thresholds) -> RunData | None:
    """Reads what the rules need.

    Args:
        records: The run.
        limits: How much of the parameters to read.

    Returns:
        The run; None where it has no step.
    """
    frame = records.steps(COLUMNS)
    if not len(frame):
        return None
    first, last = int(frame.index.min()), int(frame.index.max())
    sample = read_sample(records, first, last, limits)
    return RunData(tracks_of(frame), records.layout, sample, records.events())


def named(names: Sequence[str], most: int = 3) -> str:
    """Lists names, and says how many more there are.

    Args:
        names: The names.
        most: How many to write out.

    Example:
        >>> named(["a", "b", "c", "d", "e"])
        'a, b, c and 2 more'
    """
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"


def counted(count: int, noun: str) -> str:
    """Writes a number of things.

    Args:
        count: How many.
        noun: One of them.

    Example:
        >>> counted(1, "step"), counted(2_000, "step")
        ('1 step', '2,000 steps')
    """
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def first_steps(steps: Array) -> tuple[int, ...]:
    """Takes as many steps as a finding names.

    Args:
        steps: int array.
    """
    return tuple(int(step) for step in steps[:MOST_STEPS])


def printable(text: str) -> str:
    r"""Replaces what a terminal would obey, such as escape sequences in a name, by its code.

    Args:
        text: Any text.

    Example:
        >>> printable("a\x1b[2J")
        'a\\x1b[2J'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

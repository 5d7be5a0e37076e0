"""Records: what a report needs of a history; and Run, what it has read of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gradwatch.explain.report.sample import Sample, read_sample
from gradwatch.explain.report.thresholds import Thresholds
from gradwatch.explain.report.track import COLUMNS, Array, Track, tracks_of
from gradwatch.record.batch import Layout

if TYPE_CHECKING:
    import pandas as pd


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
class Run:
    """What was read of a run.

    Attributes:
        tracks: Its steps, by optimizer.
        layout: Its parameters.
        sample: Per-parameter numbers of some steps.
        events: All events.
    """

    tracks: Sequence[Track]
    layout: Layout
    sample: Sample
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

    def events_of(self, track: Track, kinds: Sequence[str]) -> pd.DataFrame:
        """Selects events.

        Args:
            track: Whose.
            kinds: Of which kinds.
        """
        events = self.events
        wanted = events["kind"].isin(list(kinds)) & (events["optimizer"] == track.optimizer)
        chosen: pd.DataFrame = events[wanted]
        return chosen


def read_run(records: Records, limits: Thresholds) -> Run | None:
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
    return Run(tracks_of(frame), records.layout, sample, records.events())

"""RingBuffer: the newest steps with their rows of norms, in memory that does not grow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradwatch.record.batch import NO_GRADIENT, Layout, RecordBatch, clipped_by
from gradwatch.record.event import Event
from gradwatch.record.step import StepRecord

Row = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class Entry:
    """One step before it enters the buffer.

    Attributes:
        record: The step.
        columns: Columns of the layout that the values below belong to.
        norms: float array ``[len(columns)]``: pre-clip norms in true units.
        clipped_columns: Columns of ``clipped_norms``.
        clipped_norms: Post-clip norms; None where they are ``record.clip_coef * norms``.
        statistics: Further statistics by name, over all columns of the layout.
        events: What happened in the step.
    """

    record: StepRecord
    columns: Sequence[int]
    norms: Row
    clipped_columns: Sequence[int] = ()
    clipped_norms: Row | None = None
    statistics: Mapping[str, Row] = field(default_factory=dict)
    events: tuple[Event, ...] = ()

    def with_clipped(self, columns: Sequence[int], norms: Row) -> Entry:
        """Returns the entry with post-clip norms of their own.

        Args:
            columns: Columns of the layout.
            norms: float array ``[len(columns)]``.
        """
        return replace(self, clipped_columns=columns, clipped_norms=norms)


class RingBuffer:
    """Keeps the newest entries; an older one makes room for each that comes after it is full."""

    def __init__(self, layout: Layout, capacity: int) -> None:
        """Reserves the memory.

        Args:
            layout: The parameters that the columns stand for.
            capacity: How many steps are kept, at least 1.
        """
        self.layout = layout
        self.capacity = capacity
        self._records: list[StepRecord | None] = [None] * capacity
        self._norms = np.empty((capacity, len(layout.names)), np.float32)
        self._clipped: Row | None = None
        self._explicit = np.zeros(capacity, bool)
        self._statistics: dict[str, Row] = {}
        self._added = 0

    def __len__(self) -> int:
        return min(self._added, self.capacity)

    def append(self, entry: Entry) -> None:
        """Takes in one step.

        Args:
            entry: The step.
        """
        slot = self._added % self.capacity
        self._added += 1
        self._records[slot] = entry.record
        self._widen_for(entry)
        _fill(self._norms[slot], entry.columns, entry.norms)
        self._explicit[slot] = entry.clipped_norms is not None
        if entry.clipped_norms is not None:
            _fill(self._clipped_plane()[slot], entry.clipped_columns, entry.clipped_norms)
        self._append_statistics(slot, entry.statistics)

    def batch(self, newest: int | None = None, events: tuple[Event, ...] = ()) -> RecordBatch:
        """Copies the newest steps out.

        Args:
            newest: How many; all that are kept if None.
            events: The events to hand on with them.

        Returns:
            The steps, oldest first, in arrays of their own.
        """
        count = len(self) if newest is None else min(newest, len(self))
        slots = np.arange(self._added - count, self._added) % self.capacity
        records = [record for slot in slots if (record := self._records[slot]) is not None]
        norms = self._norms[slots]
        return RecordBatch(
            layout=self.layout,
            steps=records,
            norms=norms,
            clipped_norms=self._clipped_rows(slots, records, norms),
            statistics={name: plane[slots] for name, plane in self._statistics.items()},
            events=events,
        )

    def _clipped_rows(self, slots: NDArray[Any], records: list[StepRecord], norms: Row) -> Row:
        coefficients = np.array([record.clip_coef for record in records])[:, None]
        derived = clipped_by(norms, coefficients)
        if self._clipped is None:
            return derived
        rows: Row = np.where(self._explicit[slots][:, None], self._clipped[slots], derived)
        return rows

    def _clipped_plane(self) -> Row:
        if self._clipped is None:
            self._clipped = np.full_like(self._norms, NO_GRADIENT)
        return self._clipped

    def _append_statistics(self, slot: int, statistics: Mapping[str, Row]) -> None:
        for name in statistics:
            if name not in self._statistics:
                self._statistics[name] = np.full(self._norms.shape, np.nan)
        for name, plane in self._statistics.items():
            plane[slot] = statistics.get(name, np.nan)

    def _widen_for(self, entry: Entry) -> None:
        """Goes over to float64 where a norm comes that a float32 cannot hold exactly."""
        if entry.norms.dtype != np.float64 or self._norms.dtype == np.float64:
            return
        with np.errstate(invalid="ignore"):  # rows that nothing was written to yet
            self._norms = self._norms.astype(np.float64)
        if self._clipped is not None:
            self._clipped = self._clipped.astype(np.float64)


def _fill(row: Row, columns: Sequence[int], values: Row) -> None:
    if len(columns) == len(row):
        row[:] = values
    else:
        row[:] = NO_GRADIENT
        row[columns] = values

"""Keeps the newest steps in memory, and hands them to the sinks in batches."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gradwatch.record.records import (
    NO_GRADIENT,
    Event,
    Layout,
    RecordBatch,
    Sink,
    StepRecord,
    clipped_by,
    warn_safely,
)

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
        """Keeps one step, in the place of the oldest one where the buffer is full."""
        slot = self._added % self.capacity
        self._added += 1
        self._records[slot] = entry.record
        self._widen_for(entry)
        _fill(self._norms[slot], entry.columns, entry.norms)
        self._explicit[slot] = entry.clipped_norms is not None
        if entry.clipped_norms is not None:
            if self._clipped is None:  # most runs have no clip but gradwatch's, and need no second
                self._clipped = np.full_like(self._norms, NO_GRADIENT)
            _fill(self._clipped[slot], entry.clipped_columns, entry.clipped_norms)
        for name in entry.statistics:
            if name not in self._statistics:
                self._statistics[name] = np.full(self._norms.shape, np.nan)
        for name, plane in self._statistics.items():
            plane[slot] = entry.statistics.get(name, np.nan)

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


FLUSH_STEPS = 64
FLUSH_SECONDS = 5.0
URGENT_SECONDS = 1.0

FAILED = (
    "gradwatch: {sink} failed in {call}() with {error} and gets no more records. The training and "
    "the other sinks go on."
)


class SinkHub:
    """Counts the steps that the sinks have not seen, and delivers them when it is time."""

    def __init__(self, sinks: Sequence[Sink], capacity: int) -> None:
        """Starts with nothing to deliver.

        Args:
            sinks: Who receives the records.
            capacity: How many steps may wait at most.
        """
        self._sinks = list(sinks)
        self._limit = min(FLUSH_STEPS, capacity)
        self._waiting = 0
        self._delivered_at = time.perf_counter()

    def __bool__(self) -> bool:
        return bool(self._sinks)

    def add(self, urgent: bool) -> bool:
        """Counts one more step.

        Args:
            urgent: Whether it should be seen soon: something non-finite happened.

        Returns:
            Whether it is time to deliver: 64 steps wait, or 5 seconds have passed, or one second
            where it is urgent.
        """
        if not self._sinks:
            return False
        self._waiting += 1
        return self.due(0, URGENT_SECONDS if urgent else FLUSH_SECONDS)

    def due(self, more: int, seconds: float = FLUSH_SECONDS) -> bool:
        """Tells whether it is time to deliver.

        Args:
            more: How many steps are to be counted, as soon as they are written down.
            seconds: How long the sinks may have got nothing.
        """
        if self._waiting + more >= self._limit:
            return True
        return bool(self._sinks) and time.perf_counter() - self._delivered_at > seconds

    def deliver(self, take: Callable[[int], RecordBatch]) -> None:
        """Hands the waiting steps to every sink.

        Args:
            take: Makes the batch of the newest so many steps.
        """
        if not self._sinks:
            return
        batch = take(self._waiting)
        self._waiting = 0
        self._delivered_at = time.perf_counter()
        if batch.steps or batch.events:
            for sink in list(self._sinks):
                self._call(sink, "write", partial(sink.write, batch))

    def close(self) -> None:
        """Closes every sink; safe to call again."""
        sinks, self._sinks = self._sinks, []
        for sink in sinks:
            self._call(sink, "close", sink.close)

    def _call(self, sink: Sink, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            if sink in self._sinks:
                self._sinks.remove(sink)
            description = f"{type(error).__name__}: {error}"
            warn_safely(FAILED.format(sink=type(sink).__name__, call=name, error=description))


FIRST_EVENTS = 1_000
NEWEST_EVENTS = 9_000


class FinishedStep(Protocol):
    """A step that is over, and whose numbers may still be on their way from a device."""

    can_wait: bool
    """Whether it may be written down later, together with other steps."""

    def ready(self) -> bool:
        """Tells, without waiting, whether its numbers have arrived."""

    def entry(self) -> Entry:
        """Writes the step down; waits for its numbers where they have not arrived."""


class Recorder:
    """The memory of a watcher: ring buffer, events, sinks.

    Where no optimizer has stepped yet, nobody knows whether a backward is a step of its own. Such
    entries are held: they are read like all others, but reach the sinks only when it is settled
    (:meth:`commit`), or are taken back when an optimizer steps after all (:meth:`retract`).

    Attributes:
        skipped: Steps that were not applied.
    """

    def __init__(self, buffer: RingBuffer, hub: SinkHub) -> None:
        """Starts empty.

        Args:
            buffer: Keeps the newest steps.
            hub: Hands them to the sinks.
        """
        self._buffer = buffer
        self._hub = hub
        self._first_events: list[Event] = []
        self._events: deque[Event] = deque(maxlen=NEWEST_EVENTS)
        self._undelivered: list[Event] = []
        self._expected: deque[FinishedStep] = deque()
        self._receiving = threading.RLock()
        self._held: list[FinishedStep] = []
        self._last: StepRecord | None = None
        self.skipped = 0

    @property
    def last(self) -> StepRecord | None:
        """The newest step, waited for where its numbers are on their way; None before the first."""
        self.receive(wait=True)
        return self._held[-1].entry().record if self._held else self._last

    @property
    def newest(self) -> StepRecord | None:
        """The newest step whose numbers have arrived; waits for nothing."""
        self.receive()
        return self._last

    def expect(self, step: FinishedStep) -> None:
        """Keeps a finished step, as soon as its numbers have arrived and it is time."""
        self._expected.append(step)
        # Python that has not run for the length of a step costs several times what it costs in a
        # loop: the caches have forgotten it. So steps are written down many at a time.
        if not step.can_wait or self._hub.due(len(self._expected)):
            self.receive()

    def receive(self, wait: bool = False) -> None:
        """Keeps the expected steps that have arrived, in order.

        Args:
            wait: Waits for those that have not.
        """
        if not self._expected:
            return
        with self._receiving:  # the history may be read by another thread than the training
            while self._expected and (wait or self._expected[0].ready()):
                self.add(self._expected.popleft().entry())

    def add(self, entry: Entry) -> None:
        """Keeps a finished step, and delivers when it is time."""
        self._buffer.append(entry)
        self._last = entry.record
        self.skipped += entry.record.outcome != "applied"
        self.note(entry.events)
        if self._hub.add(urgent=any(event.nonfinite for event in entry.events)):
            self.flush()

    def note(self, events: tuple[Event, ...]) -> None:
        """Keeps events, of a step or of none: the first ones for good, of the rest the newest."""
        room = FIRST_EVENTS - len(self._first_events)
        self._first_events.extend(events[:room])
        self._events.extend(events[room:])
        if self._hub:
            self._undelivered.extend(events)

    def hold(self, step: FinishedStep) -> int:
        """Keeps a backward of which nobody knows yet whether it is a step.

        Args:
            step: The backward as a step of its own.

        Returns:
            How many are held now.
        """
        self._held.append(step)
        return len(self._held)

    def commit(self) -> None:
        """Turns the held backwards into steps."""
        held, self._held = self._held, []
        for step in held:
            self.expect(step)

    def retract(self) -> None:
        """Forgets the held backwards: they belong to the window of an optimizer."""
        self._held = []

    def flush(self) -> None:
        """Delivers what the sinks have not seen."""
        with self._receiving:
            self.receive(wait=True)
            events, self._undelivered = tuple(self._undelivered), []
            self._hub.deliver(lambda count: self._buffer.batch(count, events))

    def close(self) -> None:
        """Delivers the rest and closes the sinks."""
        self.flush()
        self._hub.close()

    def events(self) -> tuple[Event, ...]:
        """Returns the events that are kept, those of held backwards included, oldest first."""
        self.receive(wait=True)
        held = (event for step in self._held for event in step.entry().events)
        return (*self._first_events, *self._events, *held)

    def batch(self) -> RecordBatch:
        """Copies out all that is kept, the held backwards included."""
        with self._receiving:
            events = self.events()
            old = self._buffer.batch()
        if not self._held:
            return replace(old, events=events)
        held = RingBuffer(self._buffer.layout, len(self._held))
        for step in self._held:
            held.append(step.entry())
        new = held.batch()
        return replace(
            new,
            steps=[*old.steps, *new.steps],
            norms=np.concatenate([old.norms, new.norms]),
            clipped_norms=np.concatenate([old.clipped_norms, new.clipped_norms]),
            events=events,
        )

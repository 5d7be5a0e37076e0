"""Keeps the newest steps in memory, and delivers steps and events to the sinks in batches."""

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

from gradwatch.errors import warn_safely
from gradwatch.record.records import (
    NO_GRADIENT,
    Event,
    Layout,
    RecordBatch,
    Sink,
    StepRecord,
    clipped_by,
)

Row = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class Entry:
    """One step before it enters the buffer.

    Attributes:
        record: The numbers of the step.
        columns: Columns of the layout that have a gradient, for ``norms``.
        norms: float array ``[len(columns)]``: norms before the clip, in true units.
        clipped_columns: Columns of the layout for ``clipped_norms``.
        clipped_norms: float array ``[len(clipped_columns)]``: norms after the clip; None if they
            are ``record.clip_coef * norms``.
        statistics: Further statistics by name, each over all columns of the layout.
        events: The events of the step.
    """

    record: StepRecord
    columns: Sequence[int]
    norms: Row
    clipped_columns: Sequence[int] = ()
    clipped_norms: Row | None = None
    statistics: Mapping[str, Row] = field(default_factory=dict)
    events: tuple[Event, ...] = ()


class RingBuffer:
    """Keeps the newest entries; when it is full, each new one replaces the oldest."""

    def __init__(self, layout: Layout, capacity: int) -> None:
        """Reserves memory for ``capacity`` steps, at least 1."""
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
        """Adds one step, in place of the oldest one if the buffer is full."""
        slot = self._added % self.capacity
        self._added += 1
        self._records[slot] = entry.record
        self._widen_for(entry)
        _fill(self._norms[slot], entry.columns, entry.norms)
        self._explicit[slot] = entry.clipped_norms is not None
        if entry.clipped_norms is not None:
            # Made when it is first needed: most runs have no clip, or gradwatch's with one factor.
            if self._clipped is None:
                self._clipped = np.full_like(self._norms, NO_GRADIENT)
            _fill(self._clipped[slot], entry.clipped_columns, entry.clipped_norms)
        for name in entry.statistics:
            if name not in self._statistics:
                self._statistics[name] = np.full(self._norms.shape, np.nan)
        for name, plane in self._statistics.items():
            plane[slot] = entry.statistics.get(name, np.nan)

    def batch(self, newest: int | None = None, events: tuple[Event, ...] = ()) -> RecordBatch:
        """Returns a copy of the newest steps, oldest first.

        Args:
            newest: The number of steps; None for all that are kept.
            events: The events to put into the batch.
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
        """Converts the arrays to float64 when the first norms in float64 come."""
        if entry.norms.dtype != np.float64 or self._norms.dtype == np.float64:
            return
        with np.errstate(invalid="ignore"):  # unused rows are uninitialized memory
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
    """Counts the steps that the sinks have not received, and decides when to deliver them.

    A sink that raises is dropped with a warning; the training and the other sinks go on.
    """

    def __init__(self, sinks: Sequence[Sink], capacity: int) -> None:
        """Starts with nothing to deliver; at most ``capacity`` steps may wait."""
        self._sinks = list(sinks)
        self._limit = min(FLUSH_STEPS, capacity)
        self._waiting = 0
        self._delivered_at = time.perf_counter()

    def __bool__(self) -> bool:
        return bool(self._sinks)

    def add(self, urgent: bool) -> bool:
        """Counts one more step.

        Args:
            urgent: Whether the step should be seen soon, because a number was not finite.

        Returns:
            Whether it is time to deliver: 64 steps are waiting, or the last delivery was more than
            5 seconds ago, or one second if urgent.
        """
        if not self._sinks:
            return False
        self._waiting += 1
        return self.due(0, URGENT_SECONDS if urgent else FLUSH_SECONDS)

    def due(self, more: int, seconds: float = FLUSH_SECONDS) -> bool:
        """Returns whether it is time to deliver.

        Args:
            more: Steps that have not been counted yet, as their records have not been made.
            seconds: The longest time since the last delivery.
        """
        if self._waiting + more >= self._limit:
            return True
        return bool(self._sinks) and time.perf_counter() - self._delivered_at > seconds

    def deliver(self, take: Callable[[int], RecordBatch]) -> None:
        """Delivers the waiting steps to every sink; ``take`` makes a batch of the newest steps."""
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
    """Whether its record may be made later, together with those of other steps."""

    def ready(self) -> bool:
        """Returns whether its numbers have arrived; never waits."""

    def entry(self) -> Entry:
        """Returns the step with its record; waits for numbers that have not arrived."""


class Recorder:
    """The memory of a watcher: ring buffer, events, sinks.

    Before an optimizer has stepped, it is not known whether a backward is a step of its own. Such
    backwards are held. They can be read like steps, but they reach the sinks only once they are
    known to be steps (:meth:`commit`), and are dropped if an optimizer steps after all
    (:meth:`retract`).

    Attributes:
        skipped: The number of steps that were not applied.
    """

    def __init__(
        self,
        buffer: RingBuffer,
        hub: SinkHub,
        on_record: Callable[[StepRecord], None] = lambda record: None,
    ) -> None:
        """Starts empty; ``on_record`` is called with each record, once it is complete."""
        self._buffer = buffer
        self._hub = hub
        self._on_record = on_record
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
        """The newest step; waits for its numbers. None before the first step."""
        self.receive(wait=True)
        return self._held[-1].entry().record if self._held else self._last

    @property
    def newest(self) -> StepRecord | None:
        """The newest step whose numbers have arrived; never waits."""
        self.receive()
        return self._last

    def expect(self, step: FinishedStep) -> None:
        """Queues a finished step; its record is made once its numbers have arrived.

        Steps that can wait are recorded in groups, when it is time to deliver.
        """
        self._expected.append(step)
        # Code that last ran one training step ago is no longer in the CPU caches, and costs several
        # times what it costs in a loop. So the records of many steps are made together.
        if not step.can_wait or self._hub.due(len(self._expected)):
            self.receive()

    def receive(self, wait: bool = False) -> None:
        """Records the expected steps that have arrived, in order.

        Args:
            wait: Whether to wait for those that have not arrived.
        """
        if not self._expected:
            return
        with self._receiving:  # a thread other than the training may read the history
            while self._expected and (wait or self._expected[0].ready()):
                self.add(self._expected.popleft().entry())

    def add(self, entry: Entry) -> None:
        """Records a finished step, and delivers if it is time."""
        self._buffer.append(entry)
        self._last = entry.record
        self.skipped += entry.record.outcome != "applied"
        self.note(entry.events)
        self._on_record(entry.record)
        if self._hub.add(urgent=any(event.nonfinite for event in entry.events)):
            self.flush()

    def note(self, events: tuple[Event, ...]) -> None:
        """Keeps events, of a step or of none: the first 1,000 and the newest 9,000 of the rest."""
        room = FIRST_EVENTS - len(self._first_events)
        self._first_events.extend(events[:room])
        self._events.extend(events[room:])
        if self._hub:
            self._undelivered.extend(events)

    def hold(self, step: FinishedStep) -> int:
        """Holds a backward that may be a step of its own; returns how many are held now."""
        self._held.append(step)
        return len(self._held)

    def commit(self) -> None:
        """Records the held backwards as steps."""
        held, self._held = self._held, []
        for step in held:
            self.expect(step)

    def retract(self) -> None:
        """Drops the held backwards, as they belong to the window of an optimizer."""
        self._held = []

    def flush(self) -> None:
        """Delivers all steps and events that the sinks have not received; waits for numbers."""
        with self._receiving:
            self.receive(wait=True)
            events, self._undelivered = tuple(self._undelivered), []
            self._hub.deliver(lambda count: self._buffer.batch(count, events))

    def close(self) -> None:
        """Delivers the rest and closes the sinks."""
        self.flush()
        self._hub.close()

    def events(self) -> tuple[Event, ...]:
        """Returns all kept events, oldest first, including those of held backwards."""
        self.receive(wait=True)
        held = (event for step in self._held for event in step.entry().events)
        return (*self._first_events, *self._events, *held)

    def batch(self) -> RecordBatch:
        """Returns a copy of all kept steps and events, including held backwards."""
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

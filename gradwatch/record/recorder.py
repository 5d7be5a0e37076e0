"""Keeps the newest steps in memory, and delivers steps and events to the sinks in batches."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gradwatch.errors import described_error, logger, warn_safely
from gradwatch.record.records import (
    NO_GRADIENT,
    Event,
    Layout,
    ParameterGroups,
    RecordBatch,
    Sink,
    StepRecord,
    clipped_by,
    delivery_of,
)
from gradwatch.record.sink_queue import SinkQueue

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
        thrown_away: Whether the gradients were thrown away, so that there was no step: only the
            events are kept.
    """

    record: StepRecord
    columns: Sequence[int]
    norms: Row
    clipped_columns: Sequence[int] = ()
    clipped_norms: Row | None = None
    statistics: Mapping[str, Row] = field(default_factory=dict)
    events: tuple[Event, ...] = ()
    thrown_away: bool = False


class RingBuffer:
    """Keeps the newest entries; when it is full, each new one replaces the oldest.

    Attributes:
        layout: The parameters.
        capacity: The most steps that it keeps.
        groups: The parameter groups of the optimizers, as in a batch.
    """

    def __init__(self, layout: Layout, capacity: int) -> None:
        """Reserves memory for ``capacity`` steps, at least 1."""
        self.layout = layout
        self.capacity = capacity
        self.groups: tuple[ParameterGroups, ...] = ()
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
            groups=self.groups,
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


class _Outlet:
    """One sink, and how much it has not received.

    Attributes:
        sink: The sink.
        queue: Gives it what is delivered.
        waiting: Steps that it has not received.
        events: Events that it has not received.
    """

    __slots__ = ("_delivered_at", "_limit", "events", "queue", "sink", "waiting")

    def __init__(self, sink: Sink, limit: int) -> None:
        """Starts with nothing to deliver; at most ``limit`` steps may wait."""
        self.queue = SinkQueue(sink)
        self.waiting = 0
        self.events: list[Event] = []
        self.sink, self._limit = sink, limit
        self._delivered_at = time.perf_counter()

    @property
    def limit(self) -> int:
        """The most steps that may wait; asked anew, as a sink may know only later what it wants."""
        return 1 if delivery_of(self.sink) == "step" else self._limit

    def due(self, more: int, seconds: float) -> bool:
        """Returns whether it is time to deliver, with ``more`` steps that are not counted yet."""
        return self.waiting + more >= self.limit or (
            time.perf_counter() - self._delivered_at > seconds
        )

    def give(self, batch: RecordBatch) -> None:
        """Puts what waits into the queue of the sink, as one batch."""
        self.queue.add(batch)
        self.waiting = 0
        self.events = []
        self._delivered_at = time.perf_counter()


class SinkHub:
    """Counts the steps that the sinks have not received, and decides when to deliver them.

    A sink gets batches of 64 steps or 5 seconds, or each step by itself if it has
    ``deliver = "step"``. One that raises is tried again
    (:class:`~gradwatch.record.sink_queue.SinkQueue`); the training and the other sinks go on.
    """

    def __init__(self, sinks: Sequence[Sink], capacity: int) -> None:
        """Starts with nothing to deliver; at most ``capacity`` steps may wait."""
        self._limit = min(FLUSH_STEPS, capacity)
        self._outlets = [_Outlet(sink, self._limit) for sink in sinks]
        self._of_parent: list[_Outlet] = []

    def __bool__(self) -> bool:
        return bool(self._outlets)

    @property
    def full(self) -> bool:
        """Whether no further step may wait: those that do would be lost."""
        return any(one.waiting >= one.limit for one in self._outlets)

    def note(self, events: Sequence[Event]) -> None:
        """Notes events, for the next delivery."""
        for one in self._outlets:
            one.events.extend(events)

    def add(self, urgent: bool) -> bool:
        """Counts one more step.

        Args:
            urgent: Whether the step should be seen soon, because a number was not finite.

        Returns:
            Whether it is time to deliver to a sink: 64 steps are waiting, or the last delivery was
            more than 5 seconds ago, or one second if urgent, or it gets each step by itself.
        """
        for one in self._outlets:
            one.waiting += 1
        return self.due(0, URGENT_SECONDS if urgent else FLUSH_SECONDS)

    def due(self, more: int, seconds: float = FLUSH_SECONDS) -> bool:
        """Returns whether it is time to make records, and to deliver them if there is a sink.

        Args:
            more: Steps that have not been counted yet, as their records have not been made.
            seconds: The longest time since the last delivery.
        """
        return more >= self._limit or any(one.due(more, seconds) for one in self._outlets)

    def deliver(self, take: Callable[[int, tuple[Event, ...]], RecordBatch]) -> None:
        """Delivers to every sink what waits for it.

        Args:
            take: Makes a batch of the newest steps, as many as are asked for, with these events.
        """
        self._deliver(self._outlets, take)

    def deliver_due(
        self, take: Callable[[int, tuple[Event, ...]], RecordBatch], urgent: bool
    ) -> None:
        """Delivers to the sinks for which it is time; see :meth:`add` and :meth:`deliver`."""
        seconds = URGENT_SECONDS if urgent else FLUSH_SECONDS
        self._deliver([one for one in self._outlets if one.due(0, seconds)], take)

    def _deliver(
        self,
        outlets: Sequence[_Outlet],
        take: Callable[[int, tuple[Event, ...]], RecordBatch],
    ) -> None:
        batches: dict[tuple[int, int], RecordBatch] = {}
        # First into every queue: an interrupt in one sink then costs the others nothing.
        for one in outlets:
            # What waits is always the newest, so equal numbers of it are the same.
            size = one.waiting, len(one.events)
            if size not in batches:
                batches[size] = take(one.waiting, tuple(one.events))
            one.give(batches[size])
        for one in outlets:
            one.queue.deliver()

    def close(self) -> None:
        """Tries once more what a sink has not taken, and closes every sink; safe to call again."""
        outlets, self._outlets = self._outlets, []
        with ExitStack() as closing:  # also if one is interrupted, the others are closed
            for one in reversed(outlets):
                closing.callback(one.queue.close)

    def disown(self) -> None:
        """Leaves the sinks to the process that this one was forked from."""
        # They stay referenced: a file that is freed would write the parent's buffered bytes again.
        self._of_parent, self._outlets = self._outlets, []


FIRST_EVENTS = 1_000
NEWEST_EVENTS = 9_000

UNREAD = (
    "gradwatch: the numbers of {steps:,} steps could not be read, because of {error}. These steps "
    "are missing in the record; all others were delivered, and every sink is closed."
)

FORKED = (
    "gradwatch: this process was forked from one that is being watched, and takes steps of its "
    "own. They are in the history of this process, but in no sink: sinks belong to the process "
    "that called attach(). Call watch() in the process that trains."
)


class FinishedStep(Protocol):
    """A step that is over, and whose numbers may still be on their way from a device."""

    can_wait: bool
    """Whether its record may be made later, together with those of other steps."""

    @property
    def settled(self) -> bool:
        """Whether nothing that the training does next can change its record."""

    def ready(self) -> bool:
        """Returns whether its numbers have arrived; never waits."""

    def wait(self) -> None:
        """Waits until its numbers have arrived."""

    def entry(self) -> Entry:
        """Returns the step with its record; waits for numbers that have not arrived."""


_LOOKED_AT = 8  # steps of those on their way; a look at one costs a microsecond or two


def _is_ready(step: FinishedStep) -> bool:
    try:
        return step.ready()
    except Exception:
        # The device has failed, and can be asked nothing any more. The training's next call says
        # so, and what had arrived is read at the end of the run.
        return False


class ComingStep:
    """A step that is over, for whoever logs it as soon as its numbers have arrived."""

    __slots__ = ("_layout", "_lock", "_step")

    def __init__(self, step: FinishedStep, lock: threading.RLock, layout: Layout) -> None:
        """Reads the step under the lock of its recorder; see :attr:`Recorder.on_step`."""
        self._step, self._lock, self._layout = step, lock, layout

    def arrived(self) -> bool:
        """Returns whether :meth:`record` would return at once; never waits."""
        return _is_ready(self._step)

    def record(self) -> StepRecord | None:
        """Returns the record of the step; waits for numbers that have not arrived.

        Steps are to be read in the order in which they were taken.

        Returns:
            The record; None if the gradients were thrown away, so that there was no step.
        """
        entry = self._entry()
        return None if entry.thrown_away else entry.record

    def batch(self) -> RecordBatch | None:
        """Returns the step as a sink would get it, with its norms; else as :meth:`record`."""
        entry = self._entry()
        if entry.thrown_away:
            return None
        alone = RingBuffer(self._layout, 1)
        alone.append(entry)
        return alone.batch(events=entry.events)

    def _entry(self) -> Entry:
        with self._lock:
            return self._step.entry()


class Recorder:
    """The memory of a watcher: ring buffer, events, sinks.

    Before an optimizer has stepped, it is not known whether a backward is a step of its own. Such
    backwards are held. They can be read like steps, but they reach the sinks only once they are
    known to be steps (:meth:`commit`), and are dropped if an optimizer steps after all
    (:meth:`retract`). Likewise gradients that seem to be thrown away may turn out to be used in
    another way, which the next step shows (:meth:`doubt`, :meth:`settle`).

    Attributes:
        skipped: The number of steps that were not applied.
        unread: The number of steps that could not be read, after an error of the device.
        spoken: What was logged: ``"nonfinite"``, ``"skipped"``; each once.
        on_step: Called with each step when it is over, in order; None if nobody wants to know.
    """

    def __init__(
        self,
        buffer: RingBuffer,
        hub: SinkHub,
        on_record: Callable[[StepRecord], None] = lambda record: None,
        on_events: Callable[[Sequence[Event]], None] | None = None,
    ) -> None:
        """Starts empty.

        Args:
            buffer: The memory of the newest steps.
            hub: The sinks.
            on_record: Called with each record, once it is complete.
            on_events: Called with events, at once; None if nobody wants to know.
        """
        self._buffer = buffer
        self._hub = hub
        self._on_record = on_record
        self._on_events = on_events
        self._first_events: list[Event] = []
        self._events: deque[Event] = deque(maxlen=NEWEST_EVENTS)
        self._expected: deque[FinishedStep] = deque()
        self._receiving = threading.RLock()
        self._hurries = False
        self._held: list[FinishedStep] = []
        self._doubtful: list[FinishedStep] = []
        self._last: StepRecord | None = None
        self._forked = False
        self.unread = 0
        self._error: Exception | None = None
        self.skipped = 0
        self.spoken: set[str] = set()
        self.on_step: Callable[[ComingStep], None] | None = None

    @property
    def last(self) -> StepRecord | None:
        """The newest step; waits for its numbers. None before the first step."""
        self.receive(wait=True)
        entries = (step.entry() for step in reversed(self._held or self._expected))
        records = (entry.record for entry in entries if not entry.thrown_away)
        return next(records, self._last)

    @property
    def newest(self) -> StepRecord | None:
        """The newest step whose numbers have arrived; never waits."""
        self.receive()
        with self._receiving:
            if not self._expected or self._expected[0].settled:
                return self._last
            entries = (step.entry() for step in reversed(self._expected) if _is_ready(step))
            records = (entry.record for entry in entries if not entry.thrown_away)
            return next(records, self._last)

    def expect(self, step: FinishedStep) -> None:
        """Queues a finished step; its record is made once its numbers have arrived.

        Steps that can wait are recorded in groups, when it is time to deliver.
        """
        self._expected.append(step)
        if self.on_step is not None:
            self.on_step(ComingStep(step, self._receiving, self._buffer.layout))
        if self._forked:
            self._forked = False
            warn_safely(FORKED)
        # Code that last ran one training step ago is no longer in the CPU caches, and costs several
        # times what it costs in a loop. So the records of many steps are made together.
        self._hurries = self._hurries or not step.can_wait
        if self._hurries or self._hub.due(len(self._expected)):
            self.receive()

    def receive(self, wait: bool = False, unsettled: bool = False) -> None:
        """Records the expected steps that have arrived, in order.

        Args:
            wait: Whether to wait for those that have not arrived.
            unsettled: Whether to record also the newest ones, of optimizers whose joint step is
                not over. Otherwise these stay in the queue, so that sinks get final numbers.
        """
        if not self._expected:
            return
        with self._receiving:  # a thread other than the training may read the history
            if not wait:
                # Also those behind the first: what has arrived is there, should the device fail.
                for step in list(islice(self._expected, 1, _LOOKED_AT)):
                    _is_ready(step)
            else:
                # First for the newest: those before it have arrived then, so the host waits once.
                with suppress(Exception):  # of a device that fails; whoever reads the step is told
                    self._expected[-1].wait()
            while self._expected and (unsettled or self._expected[0].settled):
                if not wait and not _is_ready(self._expected[0]):
                    break
                self.add(self._next())
            self._hurries = self._hurries and bool(self._expected)
            if wait:
                for step in self._expected:
                    step.entry()

    def _next(self) -> Entry:
        """Returns the oldest expected step, and expects it no longer."""
        try:
            entry = self._expected[0].entry()
        except Exception as error:
            # It can never be read: a later reader must get at the steps behind it. An interrupt is
            # no such error, and the step stays.
            self._expected.popleft()
            self.unread += 1
            self._error = error
            raise
        self._expected.popleft()
        return entry

    def add(self, entry: Entry) -> None:
        """Records a finished step, and delivers if it is time."""
        if entry.events:
            self.note(entry.events)
            self._speak(entry)
        if entry.thrown_away:
            # No step may ever come to deliver it with. Without an event there is nothing to tell.
            if entry.events and self._hub.due(0, URGENT_SECONDS):
                self.receive()
                self._hub.deliver(self._buffer.batch)
            return
        self._buffer.append(entry)
        self._last = entry.record
        self.skipped += entry.record.outcome != "applied"
        self._on_record(entry.record)
        urgent = any(event.nonfinite for event in entry.events)
        if self._hub.add(urgent):
            if not self._hub.full:
                self.receive()  # whatever is ready goes into the same batch
            self._hub.deliver_due(self._buffer.batch, urgent)

    def _speak(self, entry: Entry) -> None:
        """Logs the first bad gradient, and the first step that gradwatch itself has skipped."""
        if entry.record.outcome == "skipped_scaler":
            return  # a scaler skips steps while it searches for its scale
        for event in entry.events:
            kind = "nonfinite" if event.nonfinite else event.kind
            if kind in ("nonfinite", "skipped") and kind not in self.spoken:
                self.spoken.add(kind)
                logger.warning("gradwatch: %s", event.message)

    def __len__(self) -> int:
        """Returns the number of steps in the buffer."""
        return len(self._buffer)

    def note(self, events: tuple[Event, ...]) -> None:
        """Keeps events, of a step or of none: the first 1,000 and the newest 9,000 of the rest."""
        if self._on_events is not None:
            self._on_events(events)
        room = FIRST_EVENTS - len(self._first_events)
        self._first_events.extend(events[:room])
        self._events.extend(events[room:])
        self._hub.note(events)

    def note_groups(self, groups: ParameterGroups) -> None:
        """Notes the parameter groups that an optimizer has from one of its steps on."""
        self._buffer.groups = (*self._buffer.groups, groups)

    def reshape(self, shapes: tuple[tuple[int, ...], ...]) -> None:
        """Notes the shapes of the parameters, where others have taken their place."""
        layout = self._buffer.layout
        if shapes != layout.shapes:
            self._buffer.layout = replace(layout, shapes=shapes)

    def hold(self, step: FinishedStep) -> int:
        """Holds a backward that may be a step of its own; returns how many are held now."""
        self._held.append(step)
        return len(self._held)

    def commit(self) -> None:
        """Records the held backwards as steps."""
        held, self._held = self._held, []
        self._expected.extend(held)
        if self._hub.due(len(self._expected)) or not all(step.can_wait for step in held):
            self.receive()

    def retract(self) -> None:
        """Drops the held backwards, as they belong to the window of an optimizer."""
        self._held = []

    def doubt(self, step: FinishedStep) -> None:
        """Holds gradients that were thrown away, unless the next step shows a use of them."""
        self._doubtful.append(step)

    def settle(self, steps: Sequence[FinishedStep], true: bool) -> None:
        """Records gradients that were in doubt, or drops them if ``true`` is False."""
        known = set(map(id, steps))
        self._doubtful = [step for step in self._doubtful if id(step) not in known]
        for step in steps if true else ():
            self.expect(step)

    def flush(self) -> None:
        """Delivers all steps and events that the sinks have not received; waits for numbers."""
        with self._receiving:
            self.receive(wait=True, unsettled=True)
            self._hub.deliver(self._buffer.batch)

    def close(self) -> None:
        """Delivers the rest and closes the sinks, whatever happens.

        Steps whose numbers cannot be read, after an error of the device, are left out with a
        warning.
        """
        with ExitStack() as ending:  # last in, first out
            ending.callback(self._tell_unread)
            ending.callback(self._hub.close)
            ending.enter_context(self._receiving)
            ending.callback(self._hub.deliver, self._buffer.batch)
            self.receive_readable()

    def receive_readable(self) -> None:
        """Records all expected steps; waits, and leaves out those that cannot be read."""
        while self._expected:
            unread = self.unread
            try:
                self.receive(wait=True, unsettled=True)
            except Exception:
                if self.unread == unread:  # no error of reading, which is told at the end
                    raise

    def _tell_unread(self) -> None:
        if self._error is not None:
            warn_safely(UNREAD.format(steps=self.unread, error=described_error(self._error)))
            self._error = None

    def disown(self) -> None:
        """Leaves the sinks, and what they have not received, to the parent of this fork."""
        self._receiving = threading.RLock()  # a thread of the parent may have held it
        self._forked = bool(self._hub)
        self._hub.disown()

    def events(self) -> tuple[Event, ...]:
        """Returns all kept events, oldest first, including held and doubtful ones."""
        self.receive(wait=True, unsettled=True)
        waiting = (*self._doubtful, *self._held)
        held = (event for step in waiting for event in step.entry().events)
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
            groups=old.groups,
            steps=[*old.steps, *new.steps],
            norms=np.concatenate([old.norms, new.norms]),
            clipped_norms=np.concatenate([old.clipped_norms, new.clipped_norms]),
            events=events,
        )

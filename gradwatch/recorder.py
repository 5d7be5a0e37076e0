"""Recorder: takes finished steps, keeps the newest, and passes them on to the sinks."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import replace
from typing import Protocol

import numpy as np

from gradwatch.record.batch import RecordBatch
from gradwatch.record.buffer import Entry, RingBuffer
from gradwatch.record.event import Event
from gradwatch.record.hub import SinkHub
from gradwatch.record.step import StepRecord

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
        """Takes a finished step, and keeps it when its numbers have arrived and it is time.

        Args:
            step: The step.
        """
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
        """Keeps a finished step, and delivers when it is time.

        Args:
            entry: The step.
        """
        self._buffer.append(entry)
        self._last = entry.record
        self.skipped += entry.record.outcome != "applied"
        self.note(entry.events)
        if self._hub.add(urgent=any(event.nonfinite for event in entry.events)):
            self.flush()

    def note(self, events: tuple[Event, ...]) -> None:
        """Keeps events, of a step or of none: the first ones for good, of the rest the newest.

        Args:
            events: What happened.
        """
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

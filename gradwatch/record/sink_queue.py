"""SinkQueue: the batches that one sink has not taken yet; a sink that fails is tried again."""

from __future__ import annotations

from collections import deque
from operator import gt

from gradwatch.errors import described_error, warn_safely
from gradwatch.record.records import RecordBatch, Sink

KEPT_STEPS = 4_096
KEPT_EVENTS = 10_000
KEPT_NORMS = 1 << 22
"""Most steps, events and norms (steps times parameters) that are kept for a sink that fails."""

FAILED = (
    "gradwatch: {sink} failed in write() with {error}. It is tried again, after longer and longer "
    "pauses, and what it misses is kept: up to {steps:,} steps and {events:,} events. The training "
    "and the other sinks go on."
)
LOSES = (
    "gradwatch: {sink} failed again in write(), with {error}. Its oldest records are lost from now "
    "on, as no more than {steps:,} steps and {events:,} events are kept. It is tried again."
)
RECOVERED = "gradwatch: {sink} works again and has received what it missed. {lost}"
GIVEN_UP = (
    "gradwatch: {sink} still failed in write() at the end of the run, with {error}, and is given "
    "up. {lost}"
)
ATTACHED_FAILED = (
    "gradwatch: {sink} failed in attached() with {error}. It receives the records all the same."
)
CLOSE_FAILED = (
    "gradwatch: {sink} failed in close() with {error}. The other sinks are closed all the same."
)


class SinkQueue:
    """One sink, and the batches that it has not taken yet, oldest first.

    A sink that raises is tried again at the next delivery, then after 2 more deliveries, then 4, 8
    and so on. It is given the batches that it has missed, in order, beginning with the one at which
    it raised. Beyond the limits the oldest batches are lost.

    The first failure is told when it happens, a later one when it costs records; each of these is
    followed by a second warning, when the sink works again or at the end of the run.
    """

    def __init__(self, sink: Sink, name: str = "") -> None:
        """Starts empty.

        Args:
            sink: Receives the batches.
            name: What warnings call it; left out, they say its class.
        """
        self._sink = sink
        self._name = name or type(sink).__name__
        self._waiting: deque[RecordBatch] = deque()
        self._sizes = [0, 0, 0]  # steps, events and norms that wait
        self._failures = 0  # in a row
        self._pause = 0  # deliveries to let pass before the next attempt
        self._error = ""
        self._told_before = False
        self._told = False  # of the failure that lasts
        self._lost_steps = self._lost_events = 0

    def add(self, batch: RecordBatch) -> None:
        """Adds a batch; call :meth:`deliver` after it."""
        if batch.steps or batch.events:
            self._waiting.append(batch)
            self._count(batch, 1)

    def deliver(self) -> None:
        """Gives the sink what waits for it, unless it pauses after a failure."""
        if self._pause:
            self._pause -= 1
        else:
            self._attempt()
        if self._failures:
            self._lose_oldest()

    def close(self) -> None:
        """Tries once more, says what is lost, and closes the sink, whatever happened before."""
        given_up = False
        try:
            self._attempt()
            if self._waiting:
                given_up = True
                self._lose(len(self._waiting))
                self._tell(GIVEN_UP)
        finally:
            try:
                self._sink.close()
            except Exception as error:
                if not given_up:  # otherwise the same failure would be told twice
                    self._error = described_error(error)
                    self._tell(CLOSE_FAILED)

    def _attempt(self) -> None:
        try:
            while self._waiting:
                self._sink.write(self._waiting[0])
                # Only now: what a KeyboardInterrupt in write() stops is written at the end.
                self._take_oldest()
                self._failures = 0
        except Exception as error:
            self._error = described_error(error)
            self._pause = 2**self._failures - 1
            self._failures += 1
            if not self._told_before:
                self._tell_failure(FAILED)
        else:
            if self._told:
                self._tell(RECOVERED)
                self._told = False
                self._lost_steps = self._lost_events = 0

    def _lose_oldest(self) -> None:
        """Drops the oldest batches beyond the limits, but never the newest one."""
        most = KEPT_STEPS, KEPT_EVENTS, KEPT_NORMS
        lost = False
        while len(self._waiting) > 1 and any(map(gt, self._sizes, most)):
            self._lose(1)
            lost = True
        if lost and not self._told:
            self._tell_failure(LOSES)

    def _lose(self, batches: int) -> None:
        for _ in range(batches):
            batch = self._take_oldest()
            self._lost_steps += len(batch.steps)
            self._lost_events += len(batch.events)

    def _take_oldest(self) -> RecordBatch:
        batch = self._waiting.popleft()
        self._count(batch, -1)
        return batch

    def _count(self, batch: RecordBatch, times: int) -> None:
        # Not summed when it is asked for: thousands of batches of one step may wait.
        for index, size in enumerate((len(batch.steps), len(batch.events), batch.norms.size)):
            self._sizes[index] += times * size

    def _tell_failure(self, text: str) -> None:
        self._told_before = self._told = True
        self._tell(text)

    def _tell(self, text: str) -> None:
        lost = lost_records(self._lost_steps, self._lost_events)
        name, error = self._name, self._error
        text = text.format(sink=name, error=error, lost=lost, steps=KEPT_STEPS, events=KEPT_EVENTS)
        warn_safely(text.rstrip())


def introduce(sink: Sink, watcher: object) -> None:
    """Tells a sink that has a method ``attached(watcher)`` whose records it will receive."""
    attached = getattr(sink, "attached", None)
    if callable(attached):  # whatever else is called so is of no concern of ours
        try:
            attached(watcher)
        except Exception as error:
            told = {"sink": type(sink).__name__, "error": described_error(error)}
            warn_safely(ATTACHED_FAILED.format(**told))


def lost_records(steps: int, events: int) -> str:
    """Says how many records are lost, as a sentence; "" if none is."""
    return f"Lost: steps {steps:,}, events {events:,}." if steps or events else ""

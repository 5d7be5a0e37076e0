"""SinkHub: hands records to the sinks in batches, and leaves out a sink that fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

from gradwatch.record.batch import RecordBatch
from gradwatch.record.sinks import Sink, warn_safely

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

"""LateSinks: the sinks of a model that are made once it has stepped."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace

from gradwatch.record.records import Event, RecordBatch, Sink, delivery_of
from gradwatch.record.sink_queue import SinkQueue, introduce


class LateSinks:
    """A sink that makes others when the first steps come, and passes everything on to them.

    A sink may make a file, or a run on a server, as soon as it exists: a model that is never
    stepped must not leave one behind. Each of the sinks is tried again on its own when it fails.
    """

    def __init__(self, make: Callable[[], Iterable[Sink]]) -> None:
        """Makes no sink yet; ``make`` is called once, unless it raises."""
        self._make = make
        self._has_begun = False
        self._early: tuple[Event, ...] = ()
        self._sinks: tuple[Sink, ...] = ()
        self._queues: list[SinkQueue] | None = None
        self._watcher: Callable[[], object] = lambda: None

    def attached(self, watcher: object) -> None:
        """Notes the watcher, for the sinks that are made later."""
        self._watcher = weakref.ref(watcher)

    def begin(self) -> None:
        """Notes that the model has stepped: a step that raises is not recorded, its events are."""
        self._has_begun = True

    @property
    def deliver(self) -> str:
        """Each step by itself if one of the sinks wants that; the first one has them made."""
        if self._queues is None:
            return "step" if self._has_begun else "batch"
        return "step" if "step" in map(delivery_of, self._sinks) else "batch"

    def write(self, batch: RecordBatch) -> None:
        """Passes a batch on; keeps events that come before the first step until then.

        Raises:
            Exception: If the sinks cannot be made; pass the batch again.
        """
        if self._queues is None:
            if not batch.steps and not self._has_begun:
                self._early += tuple(batch.events)
                return
            self._sinks = tuple(self._make())
            if (watcher := self._watcher()) is not None:
                for sink in self._sinks:
                    introduce(sink, watcher)
            self._queues = list(map(SinkQueue, self._sinks))
            batch = replace(batch, events=(*self._early, *batch.events))
        for queue in self._queues:  # first into every queue: an interrupt in one costs no other
            queue.add(batch)
        for queue in self._queues:
            queue.deliver()

    def close(self) -> None:
        """Closes the sinks that have been made."""
        queues, self._queues = self._queues, []
        with ExitStack() as closing:
            for queue in reversed(queues or ()):
                closing.callback(queue.close)

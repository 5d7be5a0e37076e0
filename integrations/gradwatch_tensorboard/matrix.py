"""Matrix: the norms of all parameters at all steps, for the Gradients tab, sorted into streams."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradwatch import Layout, RecordBatch
from gradwatch.adapters import NO_GRADIENT
from gradwatch_dashboard.wire import Tag
from gradwatch_tensorboard.events import EventList
from gradwatch_tensorboard.messages import Outgoing
from gradwatch_tensorboard.stream import Stream
from gradwatch_tensorboard.windows import EarlyEnds, Windows


class MatrixWriter:
    """Sorts the steps of a run into streams.

    A new stream begins where the parameters change or the step numbers go back.
    """

    def __init__(self, log_dir: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Starts a session without streams.

        Args:
            log_dir: The folder of the run, or an address like ``gs://...``.
            clock: A monotonic clock, in seconds. It decides when waiting windows are written.
        """
        self._session = new_session(log_dir)
        self._log_dir = log_dir
        self._clock = clock
        self._early_ends = EarlyEnds()
        self._events = EventList()
        self._streams: dict[str, Stream] = {}
        self._count = 0
        self._layout: Layout | None = None
        self._owners = Owners(0)

    def add(self, batch: RecordBatch, times: Sequence[float]) -> list[Outgoing]:
        """Adds steps and their events, and returns the Events to write now, in this order.

        ``times`` has the wall time of each step, in seconds since 1970.
        """
        outgoing = self._add_steps(batch, times) if batch.steps and batch.layout.names else []
        newest_time = times[-1] if times else time.time()
        return outgoing + self._events.add(batch.events, self._session, newest_time)

    def _add_steps(self, batch: RecordBatch, times: Sequence[float]) -> list[Outgoing]:
        if self._layout != batch.layout:
            self._layout, self._owners = batch.layout, Owners(len(batch.layout.names))
        by_optimizer = _rows_by_optimizer(batch)
        # All optimizers first: which parameters the others own decides the columns of a stream.
        for optimizer, rows in by_optimizer.items():
            self._owners.see(optimizer, batch.norms[rows])
        outgoing: list[Outgoing] = []
        for optimizer, rows in by_optimizer.items():
            for part in _rising(batch, rows):
                outgoing += self._add_part(batch, times, optimizer, part)
        return outgoing

    def rest(self) -> list[Outgoing]:
        """Returns the Events that are still to be written at the end."""
        outgoing = [part for stream in self._streams.values() for part in stream.rest()]
        return outgoing + self._events.rest()

    def _add_part(
        self, batch: RecordBatch, times: Sequence[float], optimizer: str, rows: list[int]
    ) -> list[Outgoing]:
        records = [batch.steps[row] for row in rows]
        outgoing, stream = self._stream_for(batch.layout, optimizer, records[0].step)
        norms = batch.norms[rows]
        if len(stream.columns) < norms.shape[1]:
            norms = norms[:, stream.columns]
        steps = Windows.of_steps(records, norms, [times[row] for row in rows])
        return outgoing + stream.add(steps, self._clock())

    def _stream_for(
        self, layout: Layout, optimizer: str, first_step: int
    ) -> tuple[list[Outgoing], Stream]:
        """Returns the stream of the next step, and the last Events of the stream it replaces."""
        columns = self._owners.columns(optimizer)
        old = self._streams.get(optimizer)
        goes_back = old is not None and first_step <= old.last_step
        if old is not None and not goes_back and old.layout == layout and _fits(old, columns):
            return [], old
        # Steps go back when a checkpoint is loaded during the run. A reader replaces the repeated
        # steps only if they belong to a later session.
        if goes_back:
            self._session = new_session(self._log_dir)
        tag = Tag("layout", self._session, self._count)
        self._count += 1
        new = Stream(tag, optimizer, layout, columns, self._early_ends, self._clock())
        self._streams[optimizer] = new
        return [] if old is None else old.rest(), new


def _fits(stream: Stream, columns: NDArray[np.intp]) -> bool:
    """Whether a stream holds all of these columns, and fewer than twice as many."""
    if len(columns) == len(stream.columns):
        return bool((columns == stream.columns).all())
    return 2 * len(columns) > len(stream.columns) and bool(np.isin(columns, stream.columns).all())


def _rows_by_optimizer(batch: RecordBatch) -> dict[str, list[int]]:
    """Lists the row numbers of each optimizer's steps."""
    by_optimizer: dict[str, list[int]] = {}
    for row, record in enumerate(batch.steps):
        by_optimizer.setdefault(record.optimizer, []).append(row)
    return by_optimizer


def _rising(batch: RecordBatch, rows: list[int]) -> list[list[int]]:
    """Splits rows into parts in which the step numbers rise."""
    steps = np.array([batch.steps[row].step for row in rows])
    cuts = (np.flatnonzero(np.diff(steps) <= 0) + 1).tolist()
    return [rows[a:b] for a, b in zip([0, *cuts], [*cuts, len(rows)], strict=True)]


class Owners:
    """Infers which parameters belong to each optimizer, from the gradients at its steps."""

    # Every row of a batch has a column for every watched parameter. With many optimizers, writing
    # all columns for each of them would produce mostly empty cells.

    def __init__(self, parameters: int) -> None:
        self._seen: dict[str, NDArray[np.bool_]] = {}
        self._owned = np.zeros(parameters, np.bool_)

    def see(self, optimizer: str, norms: NDArray[np.floating[Any]]) -> None:
        """Notes where an optimizer had gradients.

        ``norms`` is a float array ``[steps, parameters]``: the norms at steps of this optimizer.
        """
        present = (norms != NO_GRADIENT).any(axis=0)
        self._seen[optimizer] = present | self._seen.get(optimizer, False)
        self._owned |= present

    def columns(self, optimizer: str) -> NDArray[np.intp]:
        """Lists the columns where this optimizer had a gradient, or none had; rising intp array."""
        return np.flatnonzero(self._seen[optimizer] | ~self._owned)


_newest_session = [0]  # the latest one of this process, in milliseconds since 1970


def new_session(log_dir: str) -> str:
    """Returns a session name that is later than all earlier ones in the folder.

    It is the current time. If the clock was set back, or two sessions begin in one millisecond, it
    is one millisecond after the last write to an event file or the last session of this process.

    Args:
        log_dir: The folder of the run, or an address like ``gs://...``.

    Returns:
        Milliseconds since 1970, as 12 hexadecimal digits.
    """
    now = int(time.time() * 1000)
    # If the name did not sort last, a reader would hide the new session instead of the old one.
    _newest_session[0] = max(now, _newest_file(log_dir) + 1, _newest_session[0] + 1)
    return f"{_newest_session[0]:012x}"


def _newest_file(log_dir: str) -> int:
    newest = 0
    if "://" not in log_dir:  # listing a bucket would take seconds
        for path in Path(log_dir).glob("*tfevents*"):
            with suppress(OSError):  # another process may remove it
                newest = max(newest, path.stat().st_mtime_ns // 1_000_000)
    return newest

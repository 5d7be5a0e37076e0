"""TensorBoardWriter: a sink for TensorBoard's standard dashboards and for the Gradients tab.

It writes all values of a step as one Event, for any number of parameters, at
``StepRecord.global_step``. ``docs/reference.md`` lists every tag. The format that only the
Gradients tab reads is described in :mod:`gradwatch_dashboard.wire`.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch.utils.tensorboard import summary

from gradwatch import RecordBatch, StepRecord
from gradwatch.adapters import BlockScalars, accumulates
from gradwatch_tensorboard.events import EventText
from gradwatch_tensorboard.files import event_file
from gradwatch_tensorboard.matrix import MatrixWriter
from gradwatch_tensorboard.messages import Outgoing, ScalarEvents, summary_event
from gradwatch_tensorboard.scalars import (
    OptimizerSeries,
    Point,
    chart_layout,
    norm_spread,
)

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardWriter:
    """Writes gradient norms, clipping and events where TensorBoard shows them.

    ``docs/reference.md`` lists every tag. :meth:`write` raises disk errors; the watcher reports
    them, and passes the batch again later.

    >>> import tempfile
    >>> writer = TensorBoardWriter(tempfile.mkdtemp(), every=10)
    >>> writer.close()
    """

    # On the class, as pickles of earlier versions do not have them.
    _batch: RecordBatch | None = None
    _unsent: Iterator[Outgoing] | None = None
    _failed: Outgoing | None = None
    _first_step = 0
    _has_written = False

    def __init__(
        self,
        log_dir_or_writer: str | os.PathLike[str] | SummaryWriter,
        *,
        every: int = 1,
        block_every: int = 10,
        step_scalars: bool = True,
        blocks: bool = True,
        layout: bool = True,
        heatmap: bool = True,
    ) -> None:
        """Makes a sink. It opens its event file when the first batch arrives.

        Args:
            log_dir_or_writer: A folder, for an event file of its own that :meth:`close` closes, or
                a ``SummaryWriter`` to share, which stays open and keeps the run in one file. Make
                that writer with ``max_queue=1000``: torch's default of 10 is less than a batch, so
                the training would wait for the writer's thread.
            every: Steps between two values of a scalar. Each value written is the largest norm or
                the smallest clip coefficient since the last one. A step with an event is always
                written.
            block_every: The same for the norms of module blocks, which take most of the space.
            step_scalars: Whether to write the step scalars. Without them only block norms, events,
                layout and matrix are written.
            blocks: Whether to write the norms and the statistics of module blocks.
            layout: Whether to write a layout for the Custom Scalars dashboard. A run can have only
                one, so pass False if you write your own.
            heatmap: Whether to write the data of the Gradients tab: its list of events, and the
                norms of all parameters at all steps. The norms take 4 bytes per parameter and step
                up to step 2048; the bytes per step halve whenever the number of steps doubles.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If a number is below 1, the path is empty or a file, or the
                ``SummaryWriter`` is closed.
        """
        self._every = _checked_count("every", every)
        self._block_every = _checked_count("block_every", block_every)
        self._step_scalars = step_scalars
        self._layout = layout
        self._heatmap = _checked_flag("heatmap", heatmap)
        self._file = event_file(log_dir_or_writer)
        self._series: dict[str, OptimizerSeries] = {}
        self._scalar_events = ScalarEvents()
        self._text = EventText()
        self._text_step = -1
        self._blocks = BlockScalars(norms=blocks, statistics=blocks)
        self._matrix: MatrixWriter | None = None
        self._newest_time = 0.0
        self._begun = False
        self._closed = False

    @property
    def log_dir(self) -> str:
        """The folder that TensorBoard shows as the run."""
        return self._file.log_dir

    @property
    def has_written(self) -> bool:
        """Whether a value was passed to the event file: before that, there is no such file."""
        return self._has_written

    def write(self, batch: RecordBatch) -> None:
        """Writes a batch of consecutive steps, oldest first, and their events.

        After an error, pass the same batch again: it goes on with the value at which it failed, in
        a new event file if the file is its own. A disk error shows only after torch's writer thread
        has met it; values that had been passed to that thread by then may be missing.

        Raises:
            OSError: If writing to disk fails.
            RuntimeError: If this writer, or the SummaryWriter that it shares, is closed.
        """
        if self._closed:
            raise RuntimeError(
                f"The TensorBoardWriter of {self.log_dir!r} is closed and takes no more steps. "
                "Make a new one for a new run."
            )
        if not batch.steps and not batch.events:
            return
        if batch is not self._batch:
            self._batch = batch
            self._queue(self._outgoing(batch))
        self._send()
        # A non-finite gradient may end the process, and this batch would then show the cause.
        if any(map(_is_nonfinite, batch.steps)) or any(e.nonfinite for e in batch.events):
            with self._renewing():
                self._file.writer(self._first_step)  # raises if a file that failed is still away
                self._file.flush()

    def close(self) -> None:
        """Writes the values that still wait and releases the file. Further calls do nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            self._queue(self._rest())
            self._send()
        finally:
            self._file.close()

    def _queue(self, more: Iterator[Outgoing]) -> None:
        self._unsent = more if self._unsent is None else itertools.chain(self._unsent, more)

    def _send(self) -> None:
        """Sends what is queued; keeps the one at which it fails, and those behind it."""
        # A generator: the messages of the scalars are filled anew for each step.
        while self._unsent is not None:
            if self._failed is None:
                self._failed = next(self._unsent, None)
            if self._failed is None:
                self._unsent = None
                return
            event, step, wall_time = self._failed
            with self._renewing():
                self._file.writer(self._first_step).add_event(event, step, wall_time)
            self._failed, self._has_written = None, True

    @contextmanager
    def _renewing(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            self._file.renew()
            raise

    def _outgoing(self, batch: RecordBatch) -> Iterator[Outgoing]:
        """Yields the Events of a batch; each is valid until the next one is asked for."""
        first = (batch.steps or batch.events)[0]
        yield from self._begin(first.global_step, any(map(accumulates, batch.steps)))
        times = self._wall_times(batch.steps)
        if batch.steps:
            yield from self._steps(batch, times)
        if batch.events:
            yield from self._text_of(batch)
        if self._matrix is not None:
            yield from self._matrix.add(batch, times)

    def _rest(self) -> Iterator[Outgoing]:
        for series in self._series.values():
            yield from self._point(series, series.rest())
        if self._matrix is not None:
            yield from self._matrix.rest()

    def _begin(self, first_step: int, accumulates: bool) -> Iterator[Outgoing]:
        if self._begun:
            return
        self._begun = True
        self._first_step = first_step
        if self._heatmap:
            self._matrix = MatrixWriter(self.log_dir)
        if self._layout:
            layout = chart_layout(step_scalars=self._step_scalars, accumulates=accumulates)
            yield Outgoing(summary_event(layout), 0, time.time())

    def _wall_times(self, records: Sequence[StepRecord]) -> list[float]:
        # The delay before a batch arrives varies, so these estimates can go back in time; the wall
        # time that is written must not.
        now = time.time()
        attached = now - records[-1].time_s if records else now
        times = [attached + record.time_s for record in records]
        times = list(itertools.accumulate(times, max, initial=self._newest_time))[1:]
        self._newest_time = times[-1] if times else self._newest_time
        return times

    def _steps(self, batch: RecordBatch, times: Sequence[float]) -> Iterator[Outgoing]:
        # Without step scalars the percentiles are unused, so pass no parameters to skip the work.
        spreads = norm_spread(batch.norms[:, : None if self._step_scalars else 0]).tolist()
        eventful = {(event.optimizer, event.step) for event in batch.events}
        rows = zip(batch.steps, times, spreads, self._blocks.of(batch), strict=True)
        for record, wall_time, spread, blocks in rows:
            series = self._series_of(record.optimizer)
            before = series.add(
                record,
                wall_time,
                spread,
                blocks,
                notable=_is_notable(record) or (record.optimizer, record.step) in eventful,
            )
            yield from self._point(series, before)
        for series in self._series.values():
            yield from self._point(series, series.ready())

    def _series_of(self, optimizer: str) -> OptimizerSeries:
        series = self._series.get(optimizer)
        if series is None:
            series = self._series[optimizer] = OptimizerSeries(
                optimizer if self._series else "",
                every=self._every,
                block_every=self._block_every,
                step_scalars=self._step_scalars,
            )
        return series

    def _point(self, series: OptimizerSeries, point: Point | None) -> Iterator[Outgoing]:
        if point is not None and point.values:
            event = self._scalar_events.fill(point.values, series.meaning)
            yield Outgoing(event, point.step, point.time)

    def _text_of(self, batch: RecordBatch) -> Iterator[Outgoing]:
        text = self._text.add(batch.events, next(iter(self._series), ""))
        if text is None:
            return
        # All optimizers and events share one tag, whose steps must rise: move a used step by one.
        newest = max(event.global_step for event in batch.events)
        self._text_step = max(self._text_step + 1, newest)
        message = summary.text("gradwatch/events", text)  # type: ignore[no-untyped-call]  # torch's
        yield Outgoing(summary_event(message), self._text_step, time.time())


def _is_nonfinite(record: StepRecord) -> bool:
    return record.nonfinite_parameters > 0


def _is_notable(record: StepRecord) -> bool:
    return _is_nonfinite(record) or record.outcome != "applied"


def _checked_count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, a number of steps, got {value!r}.")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")
    return value


def _checked_flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}.")
    return value

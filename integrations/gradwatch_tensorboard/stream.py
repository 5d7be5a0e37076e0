"""Stream: the windows of one optimizer with one set of parameters, in chunks and segments."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gradwatch import Layout
from gradwatch_dashboard.wire import COLUMNS, StreamLayout, Tag
from gradwatch_tensorboard.messages import Outgoing, array_event, text_event
from gradwatch_tensorboard.windows import FURTHER_COLUMNS, EarlyEnds, WindowReducer, Windows

CHUNK_WINDOWS = 64
"""Windows in a chunk, which is written as one Event."""

CHUNK_BYTES = 16 * 2**20
"""Upper bound on the norms in a chunk. It applies when there are many parameters."""

SEGMENT_CHUNKS = 100
"""Chunks in a segment: as many as TensorBoard's data server keeps of a tag by default."""

SEGMENT_BYTES = 24 * 2**20
"""Upper bound on the norms in a segment: it is read in one reply, and one of 256 MiB fails."""

FLUSH_SECONDS = 4.5
"""Time after which waiting windows are written: a little under the 5 s that batches may wait."""

_GLOBAL_STEP = COLUMNS.index("global_step")
_WALL_TIME = COLUMNS.index("wall_time")


class Stream:
    """Turns the steps of a stream into Events.

    Attributes:
        columns: intp array ``[P]``: the columns of a batch that the stream holds.
        layout: The layout of the batches.
        last_step: The last step that was added; 0 before the first one.
    """

    def __init__(
        self,
        tag: Tag,
        optimizer: str,
        layout: Layout,
        columns: NDArray[np.intp],
        early_ends: EarlyEnds,
        now: float,
    ) -> None:
        """Starts an empty stream.

        Args:
            tag: The tag of the stream's layout.
            optimizer: Label of the optimizer.
            layout: The layout of the batches.
            columns: intp array ``[P]``: the columns of a batch that belong to the stream.
            early_ends: The budget of the run, shared by all its streams.
            now: Seconds on a monotonic clock.
        """
        self.layout = layout
        self.columns = columns
        self.last_step = 0
        self._tag = tag
        self._optimizer = optimizer
        self._reducer = WindowReducer(early_ends)
        self._waiting: list[Windows] = []
        self._flushed_at = now
        self._chunk_windows = max(1, min(CHUNK_WINDOWS, CHUNK_BYTES // self._row_bytes))
        self._chunks = 0
        self._segment_rows = 0
        self._segment = -1
        self._step = -1

    @property
    def _row_bytes(self) -> int:
        return max(1, 4 * len(self.columns))

    def add(self, steps: Windows, now: float) -> list[Outgoing]:
        """Adds steps and returns the Events to write now.

        Args:
            steps: One window per step, at least one.
            now: Seconds on the clock of the constructor.
        """
        # Not in the constructor: the layout takes its step and wall time from the first step.
        outgoing = [] if self.last_step else [self._layout_event(steps)]
        self.last_step = int(steps.last_steps[-1])
        complete = self._reducer.add(steps)
        if len(complete):
            self._waiting.append(complete)
        # A NaN must appear in the tab at once, so its chunk is written before it is full.
        urgent = bool(steps.are_bad.any()) or now - self._flushed_at >= FLUSH_SECONDS
        chunks = self._chunk_events(everything=urgent)
        if chunks or urgent:
            self._flushed_at = now
        return outgoing + chunks

    def rest(self) -> list[Outgoing]:
        """Returns the Events that are still to be written at the end of the stream."""
        rest = self._reducer.rest()
        if rest is not None:
            self._waiting.append(rest)
        return self._chunk_events(everything=True)

    def _layout_event(self, steps: Windows) -> Outgoing:
        columns, layout = self.columns.tolist(), self.layout
        text = StreamLayout(
            self._optimizer,
            tuple(layout.names[column] for column in columns),
            tuple(layout.modules[column] for column in columns),
            tuple(layout.shapes[column] for column in columns if layout.shapes),
            FURTHER_COLUMNS,
        ).to_json()
        self._step = int(steps.table[0, _GLOBAL_STEP])
        return Outgoing(text_event(self._tag, text), self._step, float(steps.table[0, _WALL_TIME]))

    def _chunk_events(self, *, everything: bool) -> list[Outgoing]:
        count = sum(map(len, self._waiting))
        if count == 0 or (count < self._chunk_windows and not everything):
            return []
        windows = Windows.join(self._waiting)
        kept = 0 if everything else count % self._chunk_windows
        self._waiting = [windows[count - kept :]] if kept else []
        return [
            self._chunk_event(windows[start : min(start + self._chunk_windows, count - kept)])
            for start in range(0, count - kept, self._chunk_windows)
        ]

    def _chunk_event(self, chunk: Windows) -> Outgoing:
        # A segment must stay small: TensorBoard can only read a tag as a whole.
        begins = self._segment < 0 or self._chunks == SEGMENT_CHUNKS
        begins = begins or (self._segment_rows + len(chunk)) * self._row_bytes > SEGMENT_BYTES
        if begins:
            self._segment += 1
            self._chunks = self._segment_rows = 0
        self._chunks += 1
        self._segment_rows += len(chunk)
        # Zeros are not free: TensorBoard's checksum is a Python loop and takes 0.1 µs per byte.
        bad = chunk.bad if chunk.bad.any() else chunk.bad[:0]
        arrays = {
            self._tag._replace(kind=kind, segment=self._segment): array
            for kind, array in (("norms", chunk.norms), ("bad", bad), ("steps", chunk.table))
        }
        event = array_event(arrays, described=not begins)
        # Written at the first step of the chunk. A resumed run hides all Events at or after its
        # first step, but must keep a chunk that started earlier.
        outgoing = Outgoing(event, self._step, float(chunk.table[-1, _WALL_TIME]))
        self._step = max(self._step, int(chunk.table[-1, _GLOBAL_STEP])) + 1
        return outgoing

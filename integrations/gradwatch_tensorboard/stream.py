"""Stream: one optimizer with one set of parameters, cut into chunks and segments."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gradwatch import Layout
from gradwatch_dashboard.wire import COLUMNS, StreamLayout, Tag
from gradwatch_tensorboard.messages import Outgoing, array_event, text_event
from gradwatch_tensorboard.windows import FURTHER_COLUMNS, EarlyEnds, WindowReducer, Windows

CHUNK_WINDOWS = 64
"""Windows that go out together."""

CHUNK_BYTES = 16 * 2**20
"""Norms that go out together at most, where the parameters are so many."""

SEGMENT_CHUNKS = 100
"""Chunks of a segment: as many as the data server keeps of a tag where nobody tells it to."""

SEGMENT_BYTES = 24 * 2**20
"""Norms of a segment at most: it is read in one reply, and one of 256 MiB fails."""

FLUSH_SECONDS = 4.5
"""Time after which waiting windows go out: a little less than the 5 s that batches wait at most."""

_GLOBAL_STEP = COLUMNS.index("global_step")
_WALL_TIME = COLUMNS.index("wall_time")


class Stream:
    """Writes the windows of a stream.

    Attributes:
        columns: intp array: the columns of a batch that the stream holds.
        layout: The layout of the batches.
        last_step: The last step that was taken.
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
        """Starts with nothing to write.

        Args:
            tag: Of its layout.
            optimizer: Label of the optimizer.
            layout: Of the batches.
            columns: Those that belong to the stream.
            early_ends: Those of the run: all its streams share them.
            now: Seconds, of any clock that only rises.
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
        """Adds steps and returns what is to be written now.

        Args:
            steps: A window for each, at least one.
            now: As in the constructor.
        """
        # Not in the constructor: only the first step says at which step and time the layout stands.
        outgoing = [] if self.last_step else [self._layout_event(steps)]
        self.last_step = int(steps.last_steps[-1])
        complete = self._reducer.add(steps)
        if len(complete):
            self._waiting.append(complete)
        # A NaN is seen in the tab at once, whatever is still missing in its chunk.
        urgent = bool(steps.are_bad.any()) or now - self._flushed_at >= FLUSH_SECONDS
        chunks = self._chunk_events(everything=urgent)
        if chunks or urgent:
            self._flushed_at = now
        return outgoing + chunks

    def rest(self) -> list[Outgoing]:
        """Returns all that is not written yet, at the end."""
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
        # A reader reads a tag whole, from its beginning: it must stay small.
        begins = self._segment < 0 or self._chunks == SEGMENT_CHUNKS
        begins = begins or (self._segment_rows + len(chunk)) * self._row_bytes > SEGMENT_BYTES
        if begins:
            self._segment += 1
            self._chunks = self._segment_rows = 0
        self._chunks += 1
        self._segment_rows += len(chunk)
        # TensorBoard's checksum is a loop in Python: each byte of zeros would cost its 0.1 µs too.
        bad = chunk.bad if chunk.bad.any() else chunk.bad[:0]
        arrays = {
            self._tag._replace(kind=kind, segment=self._segment): array
            for kind, array in (("norms", chunk.norms), ("bad", bad), ("steps", chunk.table))
        }
        event = array_event(arrays, described=not begins)
        # At the first step that it covers: a resumed run hides what begins at its first step or
        # later, and has to leave the chunk that it cuts in two.
        outgoing = Outgoing(event, self._step, float(chunk.table[-1, _WALL_TIME]))
        self._step = max(self._step, int(chunk.table[-1, _GLOBAL_STEP])) + 1
        return outgoing

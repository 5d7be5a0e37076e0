"""Sessions: joins what the processes of a run wrote into one timeline for each optimizer.

A later session or stream replaces the earlier data of the same optimizer, from its own first step
on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradwatch_dashboard.tensors import EventChunks, TabEvent
from gradwatch_dashboard.wire import COLUMNS, StreamLayout

StreamKey = tuple[str, int]
"""Session and number of a stream. Keys sort in the order in which the streams began."""

SegmentKey = tuple[str, int, int]
"""Session, number of the stream, number of the segment."""


FurtherColumn = tuple[str, str]
"""Name and reduction of a step column that the layout lists."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a segment that belong to a timeline.

    Attributes:
        segment: The segment that holds the rows.
        rows: The rows in the segment, with a start and a stop.
        start: Index of the first of these rows among the windows of the timeline.
        columns: intp array ``[P of the stream]``: for each column of the segment its parameter in
            the timeline. None if they are the same.
    """

    segment: SegmentKey
    rows: slice
    start: int
    columns: NDArray[np.intp] | None

    @property
    def stop(self) -> int:
        """Index of the timeline's first window after this piece."""
        return self.start + int(self.rows.stop) - int(self.rows.start)


@dataclass(frozen=True, slots=True)
class Timeline:
    """All windows that a run has for one optimizer.

    Attributes:
        layout: The parameters of the newest session, then those that only earlier ones had.
        first_steps: int64 array ``[windows]``, rising.
        last_steps: int64 array ``[windows]``. No two windows share a step.
        table: float64 array ``[windows, C]``, as written, with the further columns of the layout.
            If a later session cuts a window short, only ``last_steps`` has its new end.
        pieces: Where the cells of the windows are stored.
    """

    layout: StreamLayout
    first_steps: NDArray[np.int64]
    last_steps: NDArray[np.int64]
    table: NDArray[np.float64]
    pieces: tuple[Piece, ...]

    @property
    def first_step(self) -> int:
        """The first recorded step."""
        return int(self.first_steps[0])

    @property
    def last_step(self) -> int:
        """The last recorded step."""
        return int(self.last_steps[-1])


def join_sessions(
    layouts: Mapping[StreamKey, StreamLayout], tables: Mapping[SegmentKey, NDArray[np.float64]]
) -> dict[str, Timeline]:
    """Joins the streams of a run into one timeline per optimizer, in alphabetical order.

    ``tables`` has the windows of each segment, float64 arrays ``[windows, C]`` whose steps rise.
    """
    segments: dict[str, dict[StreamKey, list[SegmentKey]]] = {}
    for segment in sorted(tables):
        stream = segment[:2]
        if stream in layouts and len(tables[segment]):
            of_optimizer = segments.setdefault(layouts[stream].optimizer, {})
            of_optimizer.setdefault(stream, []).append(segment)
    return {name: _timeline(segments[name], layouts, tables) for name in sorted(segments)}


def first_steps_of(
    layouts: Mapping[StreamKey, StreamLayout], tables: Mapping[SegmentKey, NDArray[np.float64]]
) -> dict[str, dict[str, int]]:
    """Returns the first step of each session, by optimizer and then by session."""
    firsts: dict[str, dict[str, int]] = {}
    for segment, table in tables.items():
        if segment[:2] in layouts and len(table):
            sessions = firsts.setdefault(layouts[segment[:2]].optimizer, {})
            first = int(table[0, 0])
            sessions[segment[0]] = min(sessions.get(segment[0], first), first)
    return firsts


def join_events(
    sessions: Mapping[str, EventChunks], first_steps: Mapping[str, Mapping[str, int]]
) -> list[TabEvent]:
    """Joins the events of the sessions, oldest first.

    ``first_steps`` is the result of :func:`first_steps_of`: from these steps on, a later session
    replaces the events of earlier ones.
    """
    kept: list[TabEvent] = []
    for session in sorted(sessions):
        limits = {
            optimizer: min((first for other, first in firsts.items() if other > session), default=0)
            for optimizer, firsts in first_steps.items()
            if any(other > session for other in firsts)
        }
        for events in sessions[session].values():
            kept += (
                event
                for event in events
                if event.optimizer not in limits or event.step < limits[event.optimizer]
            )
    return kept


def _timeline(
    streams: Mapping[StreamKey, Sequence[SegmentKey]],
    layouts: Mapping[StreamKey, StreamLayout],
    tables: Mapping[SegmentKey, NDArray[np.float64]],
) -> Timeline:
    layout, columns = _join_layouts({stream: layouts[stream] for stream in streams})
    kept: list[tuple[SegmentKey, slice]] = []
    lasts: list[NDArray[np.float64]] = []
    limit = np.inf
    # From newest to oldest: each stream is kept up to the first step of any later stream.
    for stream in reversed(list(streams)):
        parts, end = [], -1.0
        for segment in streams[stream]:
            firsts, last = tables[segment][:, 0], tables[segment][:, 1]
            rows = slice(*np.searchsorted(firsts, [np.nextafter(end, np.inf), limit]).tolist())
            if rows.start < rows.stop:
                end = last[rows.stop - 1]
                parts.append((segment, rows, np.minimum(last[rows], limit - 1)))
        kept[:0] = [(segment, rows) for segment, rows, _ in parts]
        lasts[:0] = [last for *_, last in parts]
        limit = min(limit, tables[streams[stream][0]][0, 0])
    pieces, start = [], 0
    for segment, rows in kept:
        pieces.append(Piece(segment, rows, start, columns[segment[:2]]))
        start = pieces[-1].stop
    table = np.concatenate(
        [
            _widened(tables[segment][rows], layouts[segment[:2]].columns, layout.columns)
            for segment, rows in kept
        ]
    )
    last_steps = np.concatenate(lasts).astype(np.int64)
    return Timeline(layout, table[:, 0].astype(np.int64), last_steps, table, tuple(pieces))


def _widened(
    table: NDArray[np.float64], own: Sequence[FurtherColumn], all_of_them: Sequence[FurtherColumn]
) -> NDArray[np.float64]:
    """Moves a session's further columns to their places in the joined layout; NaN in the rest."""
    if own == all_of_them:
        return table
    wide = np.full((len(table), len(COLUMNS) + len(all_of_them)), np.nan)
    wide[:, : len(COLUMNS)] = table[:, : len(COLUMNS)]
    for place, column in enumerate(own):
        wide[:, len(COLUMNS) + all_of_them.index(column)] = table[:, len(COLUMNS) + place]
    return wide


def _join_layouts(
    layouts: Mapping[StreamKey, StreamLayout],
) -> tuple[StreamLayout, dict[StreamKey, NDArray[np.intp] | None]]:
    """Joins layouts, newest first, and returns where each one's columns are in the joined one."""
    positions: dict[str, int] = {}
    modules: list[str] = []
    shapes: list[tuple[int, ...]] = []
    columns: dict[StreamKey, NDArray[np.intp] | None] = {}
    # The newest first: its model is the current one. Parameters of older models go below.
    for stream in reversed(list(layouts)):
        layout = layouts[stream]
        for name, module, shape in zip(
            layout.parameters, layout.modules, layout.shapes, strict=True
        ):
            if positions.setdefault(name, len(positions)) == len(modules):
                modules.append(module)
                shapes.append(shape)
        columns[stream] = np.array([positions[name] for name in layout.parameters], np.intp)
    # Most sessions have the same parameters. None then saves the binning from reordering each row.
    for stream, found in columns.items():
        if found is not None and np.array_equal(found, np.arange(len(positions))):
            columns[stream] = None
    newest_first = [layouts[stream] for stream in reversed(list(layouts))]
    further = tuple(dict.fromkeys(column for layout in newest_first for column in layout.columns))
    joined = StreamLayout(
        newest_first[0].optimizer, tuple(positions), tuple(modules), tuple(shapes), further
    )
    return joined, columns

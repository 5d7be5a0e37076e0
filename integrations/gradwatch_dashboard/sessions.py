"""Sessions: one timeline for each optimizer of a run, out of all that its processes wrote.

A later session, or a later stream of one, replaces what earlier ones hold of the same optimizer
from its first step on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradwatch_dashboard.tensors import EventChunks, TabEvent
from gradwatch_dashboard.wire import COLUMNS, StreamLayout

StreamKey = tuple[str, int]
"""Session and number of a stream: they sort in the order in which the streams began."""

SegmentKey = tuple[str, int, int]
"""Session, number of the stream, number of the segment."""


FurtherColumn = tuple[str, str]
"""Name and reduction."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a segment that belong to a timeline.

    Attributes:
        segment: The segment.
        rows: Which of its rows.
        start: Number of the first of them in the timeline.
        columns: intp array ``[P of the stream]``: the parameters of the timeline that the columns
            stand for; None where they are the same.
    """

    segment: SegmentKey
    rows: slice
    start: int
    columns: NDArray[np.intp] | None

    @property
    def stop(self) -> int:
        """Number of the first window of the timeline behind it."""
        return self.start + int(self.rows.stop) - int(self.rows.start)


@dataclass(frozen=True, slots=True)
class Timeline:
    """All that a run holds of one optimizer.

    Attributes:
        layout: The parameters of the newest session, then those that only earlier ones had.
        first_steps: int64 array ``[windows]``, rising.
        last_steps: int64 array ``[windows]``; no two windows share a step.
        table: float64 array ``[windows, C]``, as written, with the further columns of the layout:
            the steps of a window that is cut short are those above.
        pieces: Where the cells of the windows are.
    """

    layout: StreamLayout
    first_steps: NDArray[np.int64]
    last_steps: NDArray[np.int64]
    table: NDArray[np.float64]
    pieces: tuple[Piece, ...]

    @property
    def first_step(self) -> int:
        """The first step that is there."""
        return int(self.first_steps[0])

    @property
    def last_step(self) -> int:
        """The last step that is there."""
        return int(self.last_steps[-1])


def join_sessions(
    layouts: Mapping[StreamKey, StreamLayout], tables: Mapping[SegmentKey, NDArray[np.float64]]
) -> dict[str, Timeline]:
    """Joins the streams of a run to a timeline of each optimizer, in the order of the alphabet.

    Args:
        layouts: Of each stream.
        tables: Windows of each segment, float64 arrays ``[windows, C]`` whose steps rise.
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
    """Tells from which step on each session counts: by optimizer and session."""
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

    Args:
        sessions: Session to its events.
        first_steps: Of :func:`first_steps_of`: a later session replaces earlier events from there.
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
    # From the newest on, each kept up to the first step of those behind it.
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
    """Puts the further columns of a session where those of all sessions are; NaN for others."""
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
    """Joins layouts, the newest first; and where the columns of each are in the whole."""
    positions: dict[str, int] = {}
    modules: list[str] = []
    shapes: list[tuple[int, ...]] = []
    columns: dict[StreamKey, NDArray[np.intp] | None] = {}
    # The newest first: its model is the one that is being looked at, the rest stands below.
    for stream in reversed(list(layouts)):
        layout = layouts[stream]
        for name, module, shape in zip(
            layout.parameters, layout.modules, layout.shapes, strict=True
        ):
            if positions.setdefault(name, len(positions)) == len(modules):
                modules.append(module)
                shapes.append(shape)
        columns[stream] = np.array([positions[name] for name in layout.parameters], np.intp)
    # Mostly all sessions have the same parameters: None spares the binning to sort each row anew.
    for stream, found in columns.items():
        if found is not None and np.array_equal(found, np.arange(len(positions))):
            columns[stream] = None
    newest_first = [layouts[stream] for stream in reversed(list(layouts))]
    further = tuple(dict.fromkeys(column for layout in newest_first for column in layout.columns))
    joined = StreamLayout(
        newest_first[0].optimizer, tuple(positions), tuple(modules), tuple(shapes), further
    )
    return joined, columns

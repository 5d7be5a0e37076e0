"""Store: what was read of a run; a tag is read again only when it has grown."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from gradwatch_dashboard.event_log import Chunks, Entry, kept_events, read_events
from gradwatch_dashboard.layouts import read_layout
from gradwatch_dashboard.provider import Provider, Source, Version
from gradwatch_dashboard.segments import Matrix, Steps, read_matrix, read_steps
from gradwatch_dashboard.sessions import (
    Piece,
    SegmentKey,
    Track,
    first_steps_of,
    join_sessions,
)
from gradwatch_dashboard.wire import StreamLayout, Tag

TOGETHER = 64
"""Small tags that are read in one call."""

_SMALL = frozenset({"layout", "steps", "events"})
_EVENT_BYTES = 700  # about what an event takes

Tags = dict[Tag, Version]
Data = Mapping[Source, Sequence[Any]]


@dataclass(frozen=True, slots=True)
class View:
    """A run as it was at one time.

    Attributes:
        tracks: Optimizer to all that there is of it.
        events: What happened, oldest first.
        newest: Wall time of the newest Event, seconds since 1970; 0 where none has one.
    """

    tracks: dict[str, Track]
    events: list[Entry]
    newest: float


class Store:
    """What was read of one run. The caller holds :attr:`lock` while it calls anything."""

    def __init__(self, run: str) -> None:
        """Starts empty.

        Args:
            run: Name of the run.
        """
        self.lock = threading.Lock()
        self._run = run
        self._layouts: dict[Tag, tuple[Version, StreamLayout | None]] = {}
        self._steps: dict[Tag, tuple[Version, Steps]] = {}
        self._events: dict[Tag, tuple[Version, Chunks]] = {}
        self._matrices: dict[Tag, tuple[tuple[Version | None, ...], Matrix]] = {}
        self._tags: Tags = {}
        self._view: View | None = None

    @property
    def nbytes(self) -> int:
        """Memory that it takes, about."""
        matrices = sum(matrix.nbytes for _, matrix in self._matrices.values())
        tables = sum(steps.table.nbytes for _, steps in self._steps.values())
        chunks = [chunk for _, chunks in self._events.values() for chunk in chunks.values()]
        return matrices + 3 * tables + _EVENT_BYTES * sum(map(len, chunks))

    def changed(self, tags: Tags) -> list[Source]:
        """Lists what has to be read before a view.

        Args:
            tags: What there is of the run now.
        """
        if tags == self._tags:
            return []
        known = self._layouts | self._steps | self._events
        return [
            Source(self._run, tag)
            for tag, version in tags.items()
            if tag.kind in _SMALL and (tag not in known or known[tag][0] != version)
        ]

    def view(self, provider: Provider, tags: Tags, read: Data | None = None) -> View:
        """Brings everything but the cells up to date.

        Args:
            provider: Where to read.
            tags: What there is of the run now.
            read: What was read for it already.
        """
        if self._view is not None and tags == self._tags:
            return self._view
        data: dict[Source, Sequence[Any]] = dict(read or {})
        missing = [source for source in self.changed(tags) if source not in data]
        for start in range(0, len(missing), TOGETHER):
            data |= provider.read(missing[start : start + TOGETHER])
        self._take(tags, data)
        tables = {tag[1:]: steps.table for tag, (_, steps) in self._steps.items()}
        layouts = {
            tag[1:3]: layout for tag, (_, layout) in self._layouts.items() if layout is not None
        }
        sessions = {tag.session: chunks for tag, (_, chunks) in self._events.items()}
        times = [version.max_wall_time for version in tags.values()]
        self._tags, self._view = (
            tags,
            View(
                join_sessions(layouts, tables),
                kept_events(sessions, first_steps_of(layouts, tables)),
                max((time for time in times if time is not None), default=0.0),
            ),
        )
        return self._view

    def cells(self, provider: Provider, track: Track) -> list[tuple[Piece, Matrix]]:
        """Brings the cells of a track up to date.

        Args:
            provider: Where to read.
            track: Of the newest view.

        Returns:
            Its pieces, each with the cells of its segment.
        """
        return [(piece, self._matrix(provider, piece.segment)) for piece in track.pieces]

    def _take(self, tags: Tags, data: Data) -> None:
        """Takes what was read; forgets what is gone."""
        for known in (self._layouts, self._steps, self._events, self._matrices):
            for tag in set(known).difference(tags):
                del known[tag]
        for run, tag in self.changed(tags):
            version, found = tags[tag], data[Source(run, tag)]
            if tag.kind == "layout":
                self._layouts[tag] = version, read_layout(run, tag, found)
            elif tag.kind == "steps":
                self._steps[tag] = version, read_steps(run, tag, found)
            else:
                known_chunks = self._events[tag][1] if tag in self._events else {}
                self._events[tag] = version, read_events(run, tag, found, known_chunks)

    def _matrix(self, provider: Provider, segment: SegmentKey) -> Matrix:
        norms, bad, steps = (Tag(kind, *segment) for kind in ("norms", "bad", "steps"))
        versions = tuple(map(self._tags.get, (norms, bad, steps)))
        if norms not in self._matrices or self._matrices[norms][0] != versions:
            self._matrices.pop(norms, None)  # not two at a time: they are large
            layout = cast(StreamLayout, self._layouts[Tag("layout", *segment[:2])][1])
            sources = [Source(self._run, tag) for tag in (norms, bad)]
            data = provider.read([source for source in sources if source.tag in self._tags])
            self._matrices[norms] = (
                versions,
                read_matrix(
                    self._run,
                    norms,
                    self._steps[steps][1],
                    len(layout.parameters),
                    data.get(sources[0], []),
                    data.get(sources[1], []),
                ),
            )
        return self._matrices[norms][1]

"""What was read of each run, in bounded memory; a tag is read again only when it has grown."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from gradwatch_dashboard.arguments import fit_name, note
from gradwatch_dashboard.event_log import Chunks, Entry, kept_events, read_events
from gradwatch_dashboard.provider import Listing, Listings, Provider, TagSource, Version
from gradwatch_dashboard.segments import MatrixChunks, Steps, read_matrix, read_steps
from gradwatch_dashboard.sessions import Piece, SegmentKey, Timeline, first_steps_of, join_sessions
from gradwatch_dashboard.wire import COLUMNS, StreamLayout, Tag

_WRONG = "The Gradients tab leaves out the stream %s of run %s: its layout is damaged."


def read_layout(run: str, tag: Tag, data: Sequence[Any]) -> StreamLayout | None:
    """Reads a layout.

    Args:
        run: For the log.
        tag: Its tag.
        data: Its ``TensorDatum``s.

    Returns:
        The first that is whole, with names that fit into an answer; None where none is.
    """
    layouts = [layout for datum in data if (layout := _read(datum.numpy)) is not None]
    if not layouts:
        note(_WRONG, str(tag), run)
        return None
    return layouts[0]


def _read(array: Any) -> StreamLayout | None:
    try:
        (text,) = array.ravel().tolist()
        return _checked(StreamLayout.from_json(text))
    except ValueError:
        return None


def _checked(layout: StreamLayout) -> StreamLayout:
    count = len(layout.parameters)
    shapes = layout.shapes or ((),) * count
    if len(layout.modules) != count or len(shapes) != count:
        raise ValueError("modules and shapes are not as many as the parameters")
    if any(not 0 <= size < 2**53 for shape in shapes for size in shape):
        raise ValueError("a shape has a size that is none")
    parameters = tuple(map(fit_name, layout.parameters))
    if len(set(parameters)) != count:
        raise ValueError("two parameters have the same name")
    return StreamLayout(
        fit_name(layout.optimizer), parameters, tuple(map(fit_name, layout.modules)), shapes
    )


TOGETHER = 64
"""Small tags that are read in one call."""

_SMALL = frozenset({"layout", "steps", "events"})
_EVENT_BYTES = 700  # about what an event takes

Tags = dict[Tag, Version]
Data = Mapping[TagSource, Sequence[Any]]


@dataclass(frozen=True, slots=True)
class View:
    """A run as it was at one time.

    Attributes:
        tracks: Optimizer to all that there is of it.
        events: What happened, oldest first.
        newest: Wall time of the newest Event, seconds since 1970; 0 where none has one.
    """

    tracks: dict[str, Timeline]
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
        self._matrices: dict[Tag, tuple[tuple[Version | None, ...], MatrixChunks]] = {}
        self._tags: Tags = {}
        self._view: View | None = None

    @property
    def nbytes(self) -> int:
        """Memory that it takes, about."""
        matrices = sum(matrix.nbytes for _, matrix in self._matrices.values())
        tables = sum(steps.table.nbytes for _, steps in self._steps.values())
        chunks = [chunk for _, chunks in self._events.values() for chunk in chunks.values()]
        return matrices + 3 * tables + _EVENT_BYTES * sum(map(len, chunks))

    def changed(self, tags: Tags) -> list[TagSource]:
        """Lists what has to be read before a view.

        Args:
            tags: What there is of the run now.
        """
        if tags == self._tags:
            return []
        known = self._layouts | self._steps | self._events
        return [
            TagSource(self._run, tag)
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
        data: dict[TagSource, Sequence[Any]] = dict(read or {})
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

    def cells(self, provider: Provider, track: Timeline) -> list[tuple[Piece, MatrixChunks]]:
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
            version, found = tags[tag], data[TagSource(run, tag)]
            if tag.kind == "layout":
                self._layouts[tag] = version, read_layout(run, tag, found)
            elif tag.kind == "steps":
                self._steps[tag] = version, read_steps(run, tag, found)
            else:
                known_chunks = self._events[tag][1] if tag in self._events else {}
                self._events[tag] = version, read_events(run, tag, found, known_chunks)

    def _matrix(self, provider: Provider, segment: SegmentKey) -> MatrixChunks:
        norms, bad, steps = (Tag(kind, *segment) for kind in ("norms", "bad", "steps"))
        versions = tuple(map(self._tags.get, (norms, bad, steps)))
        if norms not in self._matrices or self._matrices[norms][0] != versions:
            self._matrices.pop(norms, None)  # not two at a time: they are large
            layout = cast(StreamLayout, self._layouts[Tag("layout", *segment[:2])][1])
            sources = [TagSource(self._run, tag) for tag in (norms, bad)]
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


MAX_BYTES = 256 * 2**20
"""Memory for what was read; of runs beyond it the longest unused are read again when needed."""

_BAD_STEPS = COLUMNS.index("bad_steps")
_Key = tuple[str, str]


class Runs:
    """Keeps a store for each run."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        """Starts empty.

        Args:
            max_bytes: Memory for all stores; the one in use is kept in any case.
        """
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._stores: OrderedDict[_Key, Store] = OrderedDict()
        self._sizes: dict[_Key, int] = {}
        self._listings = Listings()
        self._summaries: dict[_Key, tuple[object, dict[str, Any]]] = {}

    @contextmanager
    def open(self, provider: Provider, run: str) -> Iterator[tuple[Store, View] | None]:
        """Gives a run, as it is now, to one thread.

        Args:
            provider: Where to read.
            run: Name of the run.

        Yields:
            Its store, and what there is but the cells; None where there is no such run of ours.
        """
        tags = self._listings.get(provider, run).get(run)
        if tags is None:
            yield None
            return
        with self._store((provider.experiment, run)) as store:
            yield store, store.view(provider, tags)

    @contextmanager
    def _store(self, key: _Key) -> Iterator[Store]:
        with self._lock:
            store = self._stores.setdefault(key, Store(key[1]))
            self._stores.move_to_end(key)
        with store.lock:
            try:
                yield store
            finally:
                size = store.nbytes
        self._shrink(key, size)

    def summaries(self, provider: Provider) -> list[dict[str, Any]]:
        """Summarizes all runs.

        Args:
            provider: Where to read.

        Returns:
            What the route ``runs`` says of each, in the order of the alphabet.
        """
        listing = self._listings.get(provider)
        self._forget_others(provider.experiment, listing)
        changed = [run for run in sorted(listing) if self._changed(provider, run, listing[run])]
        for runs, read in self._read(provider, changed, listing):
            for run in runs:
                key = (provider.experiment, run)
                with self._store(key) as store:
                    summary = summarize(run, store.view(provider, listing[run], read))
                with self._lock:
                    self._summaries[key] = listing[run], summary
        found = (self._summaries.get((provider.experiment, run)) for run in sorted(listing))
        summaries = (known[1] for known in found if known is not None)
        return [one for one in summaries if one["optimizers"] or one["events"]]

    def _changed(self, provider: Provider, run: str, tags: Tags) -> bool:
        known = self._summaries.get((provider.experiment, run))
        return known is None or known[0] != tags

    def _read(
        self, provider: Provider, runs: Sequence[str], listing: Listing
    ) -> Iterator[tuple[list[str], Data]]:
        """Reads several runs at a time: a hundred of them one by one would take many seconds."""
        together: list[str] = []
        sources: list[TagSource] = []
        for run in runs:
            with self._store((provider.experiment, run)) as store:
                sources += store.changed(listing[run])
            together.append(run)
            if len(sources) >= TOGETHER or run == runs[-1]:
                yield together, provider.read(sources)
                together, sources = [], []

    def _forget_others(self, experiment: str, listing: Listing) -> None:
        with self._lock:
            known = {*self._stores, *self._summaries}
            for key in known:
                if key[0] == experiment and key[1] not in listing:
                    self._stores.pop(key, None)
                    self._sizes.pop(key, None)
                    self._summaries.pop(key, None)

    def _shrink(self, key: _Key, size: int) -> None:
        with self._lock:
            if key in self._stores:
                self._sizes[key] = size
            while sum(self._sizes.values()) > self._max_bytes and len(self._stores) > 1:
                oldest, _ = self._stores.popitem(last=False)
                self._sizes.pop(oldest, None)


def summarize(run: str, view: View) -> dict[str, Any]:
    """Says what there is of a run.

    Args:
        run: Its name.
        view: What was read of it.
    """
    optimizers = [
        {
            "optimizer": name,
            "parameters": len(track.layout.parameters),
            "first_step": track.first_step,
            "last_step": track.last_step,
            "windows": len(track.table),
            "bad_steps": int(sum(n for n in track.table[:, _BAD_STEPS].tolist() if 0 < n < 2**53)),
        }
        for name, track in view.tracks.items()
    ]
    return {
        "run": run,
        "optimizers": optimizers,
        "events": len(view.events),
        "newest": view.newest,
    }

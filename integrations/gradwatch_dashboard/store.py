"""Caches the data of each run, in bounded memory. A tag is read again only after it has grown."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from gradwatch_dashboard.provider import Listing, ListingCache, Provider, TagSource, Version
from gradwatch_dashboard.sessions import (
    Piece,
    SegmentKey,
    Timeline,
    first_steps_of,
    join_events,
    join_sessions,
)
from gradwatch_dashboard.tensors import (
    EventChunks,
    MatrixChunks,
    Steps,
    TabEvent,
    read_events,
    read_layout,
    read_matrix,
    read_steps,
)
from gradwatch_dashboard.wire import COLUMNS, StreamLayout, Tag

TOGETHER = 64
"""How many small tags are read in one call."""

_SMALL = frozenset({"layout", "steps", "events"})
_EVENT_BYTES = 700  # approximate memory of an event

Tags = dict[Tag, Version]
Data = Mapping[TagSource, Sequence[Any]]


@dataclass(frozen=True, slots=True)
class RunView:
    """A snapshot of a run, without the cells of its heat maps.

    Attributes:
        timelines: Optimizer to its timeline.
        events: The events, oldest first.
        newest: Wall time of the newest Event, in seconds since 1970; 0 if no Event has one.
    """

    timelines: dict[str, Timeline]
    events: list[TabEvent]
    newest: float


class RunStore:
    """The cached data of one run. The caller must hold :attr:`lock` during any other access."""

    def __init__(self, run: str) -> None:
        self.lock = threading.Lock()
        self._run = run
        self._layouts: dict[Tag, tuple[Version, StreamLayout | None]] = {}
        self._steps: dict[Tag, tuple[Version, Steps]] = {}
        self._events: dict[Tag, tuple[Version, EventChunks]] = {}
        self._matrices: dict[Tag, tuple[tuple[Version | None, ...], MatrixChunks]] = {}
        self._tags: Tags = {}
        self._view: RunView | None = None

    @property
    def nbytes(self) -> int:
        """Approximate memory use, in bytes."""
        matrices = sum(matrix.nbytes for _, matrix in self._matrices.values())
        tables = sum(steps.table.nbytes for _, steps in self._steps.values())
        chunks = [chunk for _, chunks in self._events.values() for chunk in chunks.values()]
        # Times 3: a timeline holds a joined copy of each table, and its steps as integers.
        return matrices + 3 * tables + _EVENT_BYTES * sum(map(len, chunks))

    def changed(self, tags: Tags) -> list[TagSource]:
        """Lists the small tags that must be read before a view of ``tags`` can be made."""
        if tags == self._tags:
            return []
        known = self._layouts | self._steps | self._events
        return [
            TagSource(self._run, tag)
            for tag, version in tags.items()
            if tag.kind in _SMALL and (tag not in known or known[tag][0] != version)
        ]

    def view(self, provider: Provider, tags: Tags, read: Data | None = None) -> RunView:
        """Returns an up-to-date view of the run. Reads what has changed, except for the cells.

        ``read`` is data that was already read, perhaps together with that of other runs.
        """
        if self._view is not None and tags == self._tags:
            return self._view
        data: dict[TagSource, Sequence[Any]] = dict(read or {})
        missing = [source for source in self.changed(tags) if source not in data]
        for start in range(0, len(missing), TOGETHER):
            data |= provider.read(missing[start : start + TOGETHER])
        self._update(tags, data)
        tables = {tag[1:]: steps.table for tag, (_, steps) in self._steps.items()}
        layouts = {
            tag[1:3]: layout for tag, (_, layout) in self._layouts.items() if layout is not None
        }
        sessions = {tag.session: chunks for tag, (_, chunks) in self._events.items()}
        times = [version.max_wall_time for version in tags.values()]
        view = RunView(
            join_sessions(layouts, tables),
            join_events(sessions, first_steps_of(layouts, tables)),
            max((time for time in times if time is not None), default=0.0),
        )
        # Both are set last: if a read fails, the next request must try again.
        self._tags, self._view = tags, view
        return view

    def cells(self, provider: Provider, timeline: Timeline) -> list[tuple[Piece, MatrixChunks]]:
        """Returns the pieces of a timeline, each with the cells of its segment.

        The timeline must be one of the newest view.
        """
        return [(piece, self._matrix(provider, piece.segment)) for piece in timeline.pieces]

    def _update(self, tags: Tags, data: Data) -> None:
        # A tag disappears when a run is deleted and started again under the same name.
        for known in (self._layouts, self._steps, self._events, self._matrices):
            for tag in set(known).difference(tags):
                del known[tag]
        # Layouts first: they say how many columns the steps have.
        for run, tag in sorted(self.changed(tags), key=lambda source: source.tag.kind != "layout"):
            version, found = tags[tag], data[TagSource(run, tag)]
            if tag.kind == "layout":
                self._layouts[tag] = version, read_layout(run, tag, found)
            elif tag.kind == "steps":
                layout = self._layout_of(tag)
                further = 0 if layout is None else len(layout.columns)
                self._steps[tag] = version, read_steps(run, tag, found, further)
            else:
                # Chunks are only ever added, so those already parsed are reused.
                known_chunks = self._events[tag][1] if tag in self._events else {}
                self._events[tag] = version, read_events(run, tag, found, known_chunks)

    def _layout_of(self, tag: Tag) -> StreamLayout | None:
        _, layout = self._layouts.get(Tag("layout", tag.session, tag.stream), (None, None))
        return layout

    def _matrix(self, provider: Provider, segment: SegmentKey) -> MatrixChunks:
        norms, bad, steps = (Tag(kind, *segment) for kind in ("norms", "bad", "steps"))
        versions = tuple(map(self._tags.get, (norms, bad, steps)))
        if norms not in self._matrices or self._matrices[norms][0] != versions:
            self._matrices.pop(norms, None)  # first: matrices are large, so never hold two versions
            layout = cast(StreamLayout, self._layout_of(norms))
            sources = [TagSource(self._run, tag) for tag in (norms, bad)]
            data = provider.read([source for source in sources if source.tag in self._tags])
            found = [data.get(source, []) for source in sources]
            windows, parameters = self._steps[steps][1], len(layout.parameters)
            matrix = read_matrix(self._run, norms, windows, parameters, *found)
            self._matrices[norms] = versions, matrix
        return self._matrices[norms][1]


MAX_BYTES = 256 * 2**20
"""Memory for cached data. Beyond it, the least recently used runs are dropped."""

_Key = tuple[str, str]


class RunCache:
    """An LRU cache with a store for each run."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        """Starts empty. The newest store is always kept, even if it exceeds ``max_bytes``."""
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._stores: OrderedDict[_Key, RunStore] = OrderedDict()
        self._sizes: dict[_Key, int] = {}
        self._listings = ListingCache()
        self._summaries: dict[_Key, tuple[object, dict[str, Any]]] = {}

    @contextmanager
    def open(self, provider: Provider, run: str) -> Iterator[tuple[RunStore, RunView] | None]:
        """Locks a run for the current thread and brings its view up to date.

        Yields:
            The store and its view; None if there is no such run with data of this plugin.
        """
        tags = self._listings.get(provider, run).get(run)
        if tags is None:
            yield None
            return
        with self._store((provider.experiment, run)) as store:
            yield store, store.view(provider, tags)

    @contextmanager
    def _store(self, key: _Key) -> Iterator[RunStore]:
        with self._lock:
            store = self._stores.setdefault(key, RunStore(key[1]))
            self._stores.move_to_end(key)
        # Outside the lock of the cache, so that other runs can be served while this one is read.
        with store.lock:
            try:
                yield store
            finally:
                size = store.nbytes
        self._shrink(key, size)

    def summaries(self, provider: Provider) -> list[dict[str, Any]]:
        """Returns the answer of the route ``runs``: a summary per run, in alphabetical order."""
        listing = self._listings.get(provider)
        self._forget_others(provider.experiment, listing)
        changed = [run for run in sorted(listing) if self._changed(provider, run, listing[run])]
        for runs, read in self._read(provider, changed, listing):
            for run in runs:
                key = (provider.experiment, run)
                with self._store(key) as store:
                    summary = _summarize(run, store.view(provider, listing[run], read))
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
        """Reads several runs per call: a hundred of them one by one would take many seconds."""
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
            for key in {*self._stores, *self._summaries}:
                if key[0] == experiment and key[1] not in listing:
                    self._stores.pop(key, None)
                    self._sizes.pop(key, None)
                    self._summaries.pop(key, None)

    def _shrink(self, key: _Key, size: int) -> None:
        with self._lock:
            if key in self._stores:  # another request may have dropped it meanwhile
                self._sizes[key] = size
            while sum(self._sizes.values()) > self._max_bytes and len(self._stores) > 1:
                oldest, _ = self._stores.popitem(last=False)
                self._sizes.pop(oldest, None)


def _summarize(run: str, view: RunView) -> dict[str, Any]:
    """Summarizes a run for the route ``runs``."""
    optimizers = [
        {
            "optimizer": name,
            "parameters": len(timeline.layout.parameters),
            "first_step": timeline.first_step,
            "last_step": timeline.last_step,
            "windows": len(timeline.table),
            "bad_steps": _count_bad_steps(timeline.table),
        }
        for name, timeline in view.timelines.items()
    ]
    events, newest = len(view.events), view.newest
    return {"run": run, "optimizers": optimizers, "events": events, "newest": newest}


def _count_bad_steps(table: NDArray[np.float64]) -> int:
    # The numbers are untrusted. A NaN fails both comparisons, and a count of 2**53 or more is not
    # exact in a browser. int() of Python floats, because a NumPy integer could overflow.
    counts = table[:, COLUMNS.index("bad_steps")].tolist()
    return int(sum(count for count in counts if 0 < count < 2**53))

"""Runs: the stores of all runs, within a bound of memory, for the threads of the server."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from gradwatch_dashboard.listings import Listings
from gradwatch_dashboard.provider import Listing, Provider, Source
from gradwatch_dashboard.store import TOGETHER, Data, Store, Tags, View
from gradwatch_dashboard.wire import COLUMNS

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
        sources: list[Source] = []
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

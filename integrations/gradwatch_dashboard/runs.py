"""Runs: the stores of all runs, within a bound of memory, for the threads of the server."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gradwatch_dashboard.listings import Listings
from gradwatch_dashboard.provider import Listing, Provider
from gradwatch_dashboard.store import Store, View
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
            yield store
        self._shrink()

    def summaries(self, provider: Provider) -> list[dict[str, Any]]:
        """Summarizes all runs.

        Args:
            provider: Where to read.

        Returns:
            What the route ``runs`` says of each, in the order of the alphabet.
        """
        listing = self._listings.get(provider)
        self._forget_others(provider.experiment, listing)
        found = (self._summary(provider, run, listing) for run in sorted(listing))
        return [summary for summary in found if summary["optimizers"] or summary["events"]]

    def _summary(self, provider: Provider, run: str, listing: Listing) -> dict[str, Any]:
        key, tags = (provider.experiment, run), listing[run]
        seen, summary = self._summaries.get(key, (None, {}))
        if seen != tags:
            with self._store(key) as store:
                summary = summarize(run, store.view(provider, tags))
            self._summaries[key] = tags, summary
        return summary

    def _forget_others(self, experiment: str, listing: Listing) -> None:
        with self._lock:
            known = {*self._stores, *self._summaries}
            for key in known:
                if key[0] == experiment and key[1] not in listing:
                    self._stores.pop(key, None)
                    self._summaries.pop(key, None)

    def _shrink(self) -> None:
        with self._lock:
            sizes = {key: store.nbytes for key, store in list(self._stores.items())}
            total = sum(sizes.values())
            for key in list(self._stores)[:-1]:
                if total <= self._max_bytes:
                    return
                total -= sizes[key]
                del self._stores[key]


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

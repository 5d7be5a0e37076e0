"""Follows a run: reads what is new since the last look, in memory that does not grow."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping
from math import isnan
from pathlib import Path
from typing import NamedTuple

from gradwatch.cli.terminal import number
from gradwatch.record.columns import STEP_DTYPES, python_rows
from gradwatch.record.folder.reader import FolderSource, ReadPosition
from gradwatch.record.records import Event, StepRecord
from gradwatch.record.schema import columns_of

KEPT = 1024
"""Number of newest steps kept, for the curve and the clip rate."""

KEPT_EVENTS = 64
"""Number of newest events kept; older ones are only counted, by kind."""

_SHOWN = {name: one for name, one in columns_of(StepRecord).items() if one.tail}

HEADINGS = {name: one.tail for name, one in _SHOWN.items()}
"""By name, the heading in ``tail`` of each column that declares one."""


def declared_texts(record: StepRecord) -> dict[str, str]:
    """Formats the numbers of the :data:`HEADINGS`, by heading; empty where nothing is shown."""
    texts = {}
    for name, one in _SHOWN.items():
        value = getattr(record, name)
        shown = not isnan(value) and (one.tail_when is None or one.tail_when(record))
        texts[one.tail] = number(value) if shown else ""
    return texts


class New(NamedTuple):
    """What is new since the last look.

    Attributes:
        rows: The newest steps, oldest first.
        left_out: Number of further new steps, before these.
        events: The newest events, oldest first.
        resumed: Whether another process has continued the run.
    """

    rows: tuple[StepRecord, ...]
    left_out: int
    events: tuple[Event, ...]
    resumed: bool

    def __bool__(self) -> bool:
        return bool(self.rows or self.events)


class Follower:
    """Reads a run folder again and again, and keeps a bounded number of steps and events.

    Attributes:
        rows: The newest steps, oldest first.
        events: The newest events, oldest first.
        event_counts: Number of events so far, by kind.
        changed_at: When something new was last seen, in seconds of ``time.monotonic()``.
    """

    def __init__(self, folder: Path) -> None:
        """Opens a run folder; at the first look everything in it is new.

        Raises:
            FileNotFoundError: If there is no such folder.
            ValueError: If it is not a run folder.
        """
        self._source = FolderSource(folder)
        self._end = ReadPosition()
        self._offsets: dict[int, int] = {}
        self.rows: deque[StepRecord] = deque(maxlen=KEPT)
        self.events: deque[Event] = deque(maxlen=KEPT_EVENTS)
        self.event_counts: Counter[str] = Counter()
        self.changed_at = time.monotonic()

    def look(self) -> New:
        """Reads what is new.

        Raises:
            FileNotFoundError: If the folder is gone.
            ValueError: If it is no longer a run folder, or a file is damaged.
        """
        new = self._source.steadily(self._look)
        if new:
            self.changed_at = time.monotonic()
        return new

    def _look(self) -> New:
        # One listing for steps and events, so that the same steps are void for both.
        listing = self._source.listing()
        table = self._source.newest_steps(listing, self._end, tuple(STEP_DTYPES), KEPT)
        rows = tuple(StepRecord(*values) for values in python_rows(table))
        resumed = 0 < self._end.session < listing.end.session
        if resumed:
            self._forget(listing.rule.void_from(self._end.session))
        come: deque[Event] = deque(maxlen=KEPT_EVENTS)
        for event in self._source.new_events(listing, self._offsets):
            come.append(event)
            self.event_counts[event.kind] += 1
        self.events += come
        self.rows += rows
        left_out = listing.rows_behind(self._end) - len(rows)
        self._end = max(self._end, listing.end)
        return New(rows, max(0, left_out), tuple(come), resumed)

    def _forget(self, void_from: Mapping[str, int]) -> None:
        """Forgets steps that a new session made void, and all events, to read them again."""
        kept = [row for row in self.rows if row.step < void_from.get(row.optimizer, row.step + 1)]
        self.rows = deque(kept, maxlen=KEPT)
        self.events.clear()
        # The counts include void events, which cannot be told apart any more: count again.
        self.event_counts.clear()
        self._offsets.clear()

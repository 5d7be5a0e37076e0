"""What is new in a run since the last look, read from its end, in memory that does not grow."""

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
"""Steps that are kept, for the curve and the clip rate."""

KEPT_EVENTS = 64
"""Events that are kept; of all others only their number by kind."""

HEADINGS = {name: one.tail for name, one in columns_of(StepRecord).items() if one.tail}
"""The columns that declare a heading of their own in tail, and these headings."""


def declared_texts(record: StepRecord) -> dict[str, str]:
    """Writes the numbers of the :data:`HEADINGS`, by heading; empty where one is NaN."""
    values = {heading: getattr(record, name) for name, heading in HEADINGS.items()}
    return {heading: "" if isnan(one) else number(one) for heading, one in values.items()}


class New(NamedTuple):
    """What has come since the last look.

    Attributes:
        rows: Steps, oldest first.
        left_out: How many more steps have come, before these.
        events: Events, oldest first.
        resumed: Whether another process has gone on with the run.
    """

    rows: tuple[StepRecord, ...]
    left_out: int
    events: tuple[Event, ...]
    resumed: bool

    def __bool__(self) -> bool:
        return bool(self.rows or self.events)


class Follower:
    """Looks into a run folder again and again; what it holds does not grow.

    Attributes:
        rows: The newest steps, oldest first.
        events: The newest events, oldest first.
        event_counts: By kind, of all events so far.
        changed_at: When something new was last seen, on ``time.monotonic()``.
    """

    def __init__(self, folder: Path) -> None:
        """Opens a run folder; what there is of it is new at the first look.

        Raises:
            FileNotFoundError: If there is no such folder.
            ValueError: If it is no run folder.
        """
        self._source = FolderSource(folder)
        self._end = ReadPosition()
        self._offsets: dict[int, int] = {}
        self.rows: deque[StepRecord] = deque(maxlen=KEPT)
        self.events: deque[Event] = deque(maxlen=KEPT_EVENTS)
        self.event_counts: Counter[str] = Counter()
        self.changed_at = time.monotonic()

    def look(self) -> New:
        """Reads what has come.

        Raises:
            FileNotFoundError: If the folder is gone.
            ValueError: If it is no run folder any more, or a file is damaged.
        """
        new = self._source.steadily(self._look)
        if new:
            self.changed_at = time.monotonic()
        return new

    def _look(self) -> New:
        # One listing for steps and events: what a resumed run makes void is void for both.
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
        """Forgets the steps that a new session takes anew, and reads all events again."""
        kept = [row for row in self.rows if row.step < void_from.get(row.optimizer, row.step + 1)]
        self.rows = deque(kept, maxlen=KEPT)
        self.events.clear()
        # Events that are void were counted too, and are not kept one by one.
        self.event_counts.clear()
        self._offsets.clear()

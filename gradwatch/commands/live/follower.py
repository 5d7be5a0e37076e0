"""Follower: what is new in a run since the last look, and what is worth showing of it."""

from __future__ import annotations

import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from gradwatch.commands.live.new_events import NewEvents
from gradwatch.commands.live.newest_steps import BEGINNING, Newest, newest_steps
from gradwatch.commands.live.row import Happening, Row
from gradwatch.record.folder.meta import check_whole, read_meta
from gradwatch.record.folder.resume import FirstSteps

KEPT = 1024
"""Steps that are kept, for the curve and the clip rate."""
TRIES = 20
PAUSE_S = 0.02


class New(NamedTuple):
    """What has come since the last look.

    Attributes:
        rows: Steps, oldest first.
        left_out: How many more steps have come, before these.
        events: Events, oldest first.
        resumed: Whether another process has gone on with the run.
    """

    rows: tuple[Row, ...]
    left_out: int
    events: tuple[Happening, ...]
    resumed: bool

    def __bool__(self) -> bool:
        return bool(self.rows or self.events)


class Follower:
    """Looks into a run folder again and again; what it holds does not grow.

    Attributes:
        rows: The newest steps, oldest first.
        events: The newest events and their numbers.
        changed_at: When something new was last seen, on ``time.monotonic()``.
    """

    def __init__(self, folder: Path) -> None:
        """Takes a run folder that has been checked to be one.

        Args:
            folder: The run folder.
        """
        self._folder = folder
        self._end = BEGINNING
        self._first: FirstSteps | None = None
        self.rows: deque[Row] = deque(maxlen=KEPT)
        self.events = NewEvents(folder)
        self.changed_at = time.monotonic()

    def look(self) -> New:
        """Reads what has come.

        Raises:
            FileNotFoundError: If the folder is gone.
            ValueError: If it is no run folder any more, or a file is damaged.
        """
        for _ in range(TRIES):
            with suppress(FileNotFoundError):  # merged into another file, or the run is gone
                return self._take(newest_steps(self._folder, self._end, KEPT, self._first))
            read_meta(self._folder)
            check_whole(self._folder)
            time.sleep(PAUSE_S)
        return New((), 0, (), False)

    def _take(self, newest: Newest) -> New:
        resumed = self._end.session not in (BEGINNING.session, newest.end.session)
        if resumed:
            self._void(newest)
        events = self.events.read(newest.first, newest.last)
        self._end, self._first = newest.end, newest.first
        self.rows.extend(newest.rows)
        new = New(newest.rows, newest.left_out, tuple(events), resumed)
        if new:
            self.changed_at = time.monotonic()
        return new

    def _void(self, newest: Newest) -> None:
        """Forgets the steps that the new session takes anew."""
        begins = newest.first.get(newest.end.session, {})
        kept = [row for row in self.rows if row.step < begins.get(row.optimizer, row.step + 1)]
        self.rows = deque(kept, maxlen=KEPT)
        self.events.restart()

"""Session: one process that writes into a run folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gradwatch.record.batch import Layout, RecordBatch
from gradwatch.record.columns import Array
from gradwatch.record.folder.arrow import labels_of
from gradwatch.record.folder.atomic import write_whole
from gradwatch.record.folder.beginnings import Beginnings
from gradwatch.record.folder.event_log import LINES, EventLog, lines_of, read_events
from gradwatch.record.folder.meta import EVENTS, NAME, STEPS, Meta, read_meta
from gradwatch.record.folder.parameters_table import ParametersTable
from gradwatch.record.folder.parts import Part
from gradwatch.record.folder.resume import is_valid, valid_events
from gradwatch.record.folder.shelf import Shelf
from gradwatch.record.folder.steps_table import StepsTable


class Session:
    """The files of one process in a run folder, from its first step on."""

    def __init__(self, folder: Path, layout: Layout, about: Mapping[str, Any]) -> None:
        """Makes the folder, or goes on in it.

        Args:
            folder: The run folder.
            layout: The parameters.
            about: What meta.json says of the session.

        Raises:
            OSError: If the disk is full or read-only.
            ValueError: If the folder is one of something else.
        """
        self._folder = folder
        self._steps_table, self._parameters_table = StepsTable(), ParametersTable()
        self._steps = Shelf(folder, self._steps_table)
        self._parameters = Shelf(folder, self._parameters_table)
        folder.mkdir(parents=True, exist_ok=True)
        meta = read_meta(folder) if (folder / NAME).exists() else Meta(layout)
        (folder / EVENTS).mkdir(exist_ok=True)
        self._steps.open()
        self._parameters.open()
        written = {part.session: part.last for part in self._steps.parts()}
        self._parameters.remove_beyond(written)
        self._resumes = bool(written)
        newest = max([len(meta.sessions), *written])
        self._log = EventLog(folder / EVENTS, newest + 1)
        self.number = self._log.session
        try:
            meta.with_session(layout, {"session": self.number, **about}).write(folder)
        except OSError:
            self._log.give_up()
            raise
        self._beginnings = Beginnings(folder / STEPS)
        self._rows = 0
        self._first: dict[str, int] = {}

    def write(self, batch: RecordBatch) -> None:
        """Writes some steps and their events, all or nothing.

        Args:
            batch: The steps.

        Raises:
            OSError: If the disk is full, read-only or gone.
        """
        length = self._log.length
        part = Part(self.number, self._rows, self._rows + len(batch.steps) - 1)
        try:
            self._log.append(batch.events, part.last)
            if batch.steps:
                self._parameters.add(part, self._parameters_table.of(batch, self._rows))
                # The steps come last: what has no row here does not exist yet.
                self._steps.add(part, self._steps_table.of(batch.steps, self._rows))
                # Both at the end: most file systems write the names of both at the first call.
                self._steps.sync()
                self._parameters.sync()
        except OSError:
            self._log.length = length
            self._parameters.withdraw(part)
            raise
        finally:
            # Also where it failed: another attempt never shares rows with what is left of this one.
            self._rows += len(batch.steps)

    def tidy(self, batch: RecordBatch) -> None:
        """Merges parts where there are many, and cuts off what the steps have made void.

        Args:
            batch: The steps that were written last.
        """
        if self._begins(batch) and self._resumes:
            self._cut()
        self._steps.merge_due()
        self._parameters.merge_due()

    def close(self) -> None:
        """Merges the small parts of all sessions."""
        self._steps.merge_all()
        self._parameters.merge_all()

    def _begins(self, batch: RecordBatch) -> bool:
        before = dict(self._first)
        for record in batch.steps:
            lowest = self._first.get(record.optimizer, record.step)
            self._first[record.optimizer] = min(lowest, record.step)
        return before != self._first

    def _cut(self) -> None:
        first = self._beginnings.of(self._steps.parts())

        def valid(part: Part, table: Any) -> Array:
            steps = table["step"].to_numpy()
            sessions = np.full(len(steps), part.session)
            return is_valid(first, sessions, labels_of(table["optimizer"]), steps)

        later = [of for session, of in first.items() if session > min(first)]
        lowest = min(min(of.values()) for of in later)
        self._parameters.cut(self.number, lowest, valid)
        self._steps.cut(self.number, lowest, valid)
        for path in sorted((self._folder / EVENTS).glob(f"*{LINES}")):
            if path.stem.isdigit() and int(path.stem) < self.number:
                events = read_events(path)
                kept = valid_events(first, int(path.stem), events)
                if len(kept) < len(events):
                    write_whole(path, lines_of(kept))

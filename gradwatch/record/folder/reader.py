"""FolderSource: reads a run folder by columns and steps, also while it is written."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import numpy as np

from gradwatch.record.batch import Layout
from gradwatch.record.columns import STEP_DTYPES, Column, Labels, Span, Table, array_of, labels_in
from gradwatch.record.event import Event
from gradwatch.record.folder.arrow import need_pyarrow, open_parquet, reading
from gradwatch.record.folder.beginnings import Beginnings
from gradwatch.record.folder.event_log import LINES, read_events
from gradwatch.record.folder.meta import EVENTS, PARAMETERS, STEPS, Meta, check_whole, read_meta
from gradwatch.record.folder.parameter_rows import ParameterRows
from gradwatch.record.folder.parts import Part, list_parts, uncovered
from gradwatch.record.folder.query import groups_with_steps, join, read_columns
from gradwatch.record.folder.resume import is_valid, valid_events
from gradwatch.record.folder.steps_table import LABELS

TRIES = 50
PAUSE_S = 0.02

T = TypeVar("T")


class FolderSource:
    """A :class:`~gradwatch.record.source.Source` that reads what the folder holds at each call."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens a folder.

        Args:
            path: The run folder.

        Raises:
            FileNotFoundError: If there is no such folder.
            ValueError: If it is no run folder, is written in a newer format, or parts are missing.
            ModuleNotFoundError: If pyarrow is not installed.
        """
        need_pyarrow("gradwatch.load()")
        self._folder = Path(path)
        self._read_meta()
        check_whole(self._folder)
        self._beginnings = Beginnings(self._folder / STEPS)
        self._rows = ParameterRows(self._folder / PARAMETERS)

    def layout(self) -> Layout:
        """See :class:`~gradwatch.record.source.Source`."""
        return self._read_meta().layout

    def statistics(self) -> tuple[str, ...]:
        """See :class:`~gradwatch.record.source.Source`."""
        return self._steadily(self._rows.statistics)

    def steps(self, columns: Iterable[str], span: Span) -> Table:
        """See :class:`~gradwatch.record.source.Source`."""
        wanted = tuple(columns)
        table = self._steadily(lambda: self._steps(wanted, span))
        return {name: table[name] for name in wanted}

    def parameters(
        self, indices: Sequence[int] | None, columns: Sequence[str], span: Span
    ) -> Table:
        """See :class:`~gradwatch.record.source.Source`."""

        def read() -> Table:
            steps = self._steps(("session", "row", "step", "clip_coef"), span)
            return self._rows.read(self.layout(), steps, indices, columns)

        return self._steadily(read)

    def events(self) -> Sequence[Event]:
        """See :class:`~gradwatch.record.source.Source`."""
        return self._steadily(self._events)

    def _read_meta(self) -> Meta:
        return read_meta(self._folder)

    def _steadily(self, read: Callable[[], T]) -> T:
        """Begins anew where a file went away, merged into another, before it could be read."""
        for _ in range(TRIES):
            with suppress(FileNotFoundError):
                return read()
            read_meta(self._folder)
            check_whole(self._folder)
            time.sleep(PAUSE_S)
        return read()

    def _steps(self, columns: Sequence[str], span: Span) -> dict[str, Column]:
        parts = uncovered(list_parts(self._folder / STEPS))
        first = self._beginnings.of(parts)
        tables = [self._part(part, ("step", "optimizer", *columns), span) for part in parts]
        wanted = dict.fromkeys(("session", "step", "optimizer", *columns))
        table = {name: _joined(name, [table[name] for table in tables]) for name in wanted}
        kept = span.holds(array_of(table["step"]))
        if len(first) > 1:
            optimizer = labels_in(table["optimizer"])
            session, step = array_of(table["session"]), array_of(table["step"])
            kept &= is_valid(first, session, optimizer, step)
        return table if kept.all() else {name: column[kept] for name, column in table.items()}

    def _part(self, part: Part, columns: Iterable[str], span: Span) -> dict[str, Column]:
        path = self._folder / STEPS / part.name
        file = open_parquet(path, LABELS)
        wanted = [name for name in dict.fromkeys(columns) if name != "session"]
        with reading(path):
            table = read_columns(file, groups_with_steps(file, span), wanted)
            rows = len(table["step"])
            table |= {name: _new(name, rows) for name in wanted if name not in table}
        return {**table, "session": np.full(rows, part.session)}

    def _events(self) -> list[Event]:
        parts = uncovered(list_parts(self._folder / STEPS))
        first, last = self._beginnings.of(parts), {part.session: part.last for part in parts}
        events: list[Event] = []
        for path in sorted((self._folder / EVENTS).iterdir()):
            if path.suffix == LINES and path.stem.isdigit():
                session = int(path.stem)
                valid = valid_events(first, session, read_events(path))
                events += [event for event, row in valid if row <= last.get(session, -1)]
        return events


def _new(name: str, rows: int) -> Column:
    """Makes a column that the gradwatch of that time did not write: a number that is not known."""
    if STEP_DTYPES.get(name) is not np.float64:
        raise KeyError(name)
    return np.full(rows, np.nan)


def _joined(name: str, columns: list[Column]) -> Column:
    if columns:
        return join(columns)
    dtype = STEP_DTYPES.get(name, np.int64)
    return Labels((), np.empty(0, np.int64)) if dtype is None else np.empty(0, dtype)

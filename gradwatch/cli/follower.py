"""What is new in a run since the last look, read from its end, in memory that does not grow."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gradwatch.record.columns import Labels, Table, array_of, labels_in
from gradwatch.record.folder.event_log import LINES, LoggedEvent, event_in
from gradwatch.record.folder.meta import EVENTS, STEPS, check_whole, read_meta
from gradwatch.record.folder.parts import Part, list_parts, uncovered
from gradwatch.record.folder.reader import (
    FirstSteps,
    SessionStarts,
    is_valid,
    read_columns,
    valid_events,
)
from gradwatch.record.folder.tables import STEP_LABELS, open_parquet, reading


class Row(NamedTuple):
    """A step, with the fields of :class:`~gradwatch.record.records.StepRecord` that tail shows."""

    step: int
    optimizer: str
    time_s: float
    grad_norm: float
    grad_norm_clipped: float
    clip_coef: float
    clip_threshold: float
    clipped: bool
    outcome: str
    nonfinite_parameters: int
    loss: float
    lr: float
    loss_scale: float


FIELDS = Row._fields


class EventRow(NamedTuple):
    """An event, with the fields of :class:`~gradwatch.record.records.Event` that tail shows."""

    step: int
    optimizer: str
    kind: str
    parameter: str
    message: str

    @classmethod
    def of(cls, event: Any) -> EventRow:
        """Takes them from an event.

        Args:
            event: The event.
        """
        return cls(*(getattr(event, name) for name in cls._fields))


class ReadPosition(NamedTuple):
    """Where in a run a step is.

    Attributes:
        session: Number of the session, from 1.
        row: Row in it, from 0.
    """

    session: int
    row: int


BEGINNING = ReadPosition(0, -1)


class Newest(NamedTuple):
    """Steps from the end of a run.

    Attributes:
        rows: The steps, oldest first.
        left_out: How many more there are behind the place where reading was to begin.
        end: The place of the newest step.
        first: Where sessions begin, if there are several.
        last: By session its newest row.
    """

    rows: tuple[Row, ...]
    left_out: int
    end: ReadPosition
    first: FirstSteps
    last: dict[int, int]


def newest_steps(folder: Path, behind: ReadPosition, most: int, first: FirstSteps | None) -> Newest:
    """Reads the steps behind a place, the newest ones if there are many.

    Args:
        folder: The run folder.
        behind: The newest step that is known already.
        most: How many steps to return.
        first: Where sessions begin, if that is known and no session has come since.

    Returns:
        The steps. Files are read from the newest row group on until there are enough.

    Raises:
        FileNotFoundError: If a file was merged into another one meanwhile.
    """
    parts = uncovered(list_parts(folder / STEPS))
    last = {part.session: part.last for part in parts}
    known = first is not None and set(last) <= {behind.session, *first}
    begins = first if known and first is not None else SessionStarts(folder / STEPS).of(parts)
    rows: list[Row] = []
    for table in _from_the_end(folder / STEPS, parts, behind):
        rows[:0] = _valid_rows(table, begins, most)
        if len(rows) >= most:
            break
    end = ReadPosition(parts[-1].session, parts[-1].last) if parts else behind
    since = end.row - behind.row if end.session == behind.session else sum(_lengths(parts, behind))
    kept = rows[-most:]
    return Newest(tuple(kept), max(0, since - len(kept)), max(end, behind), begins, last)


def _lengths(parts: Sequence[Part], behind: ReadPosition) -> Iterator[int]:
    for part in parts:
        if part.session >= behind.session:
            known = behind.row if part.session == behind.session else -1
            yield max(0, part.last - max(part.first - 1, known))


def _from_the_end(
    folder: Path, parts: Sequence[Part], behind: ReadPosition
) -> Iterator[dict[str, Any]]:
    """Gives row groups, newest first, without the rows that are known."""
    for part in reversed(parts):
        if ReadPosition(part.session, part.last) <= behind:
            return
        file = open_parquet(folder / part.name, STEP_LABELS)
        for group in reversed(range(file.metadata.num_row_groups)):
            with reading(folder / part.name):
                table = dict(read_columns(file, [group], ("row", *FIELDS)))
                table = {name: table[name] for name in ("row", *FIELDS)}
            table["session"] = np.full(len(table["row"]), part.session)
            if part.session == behind.session:
                new = array_of(table["row"]) > behind.row
                table = {name: column[new] for name, column in table.items()}
            yield table


def _valid_rows(table: Table, first: FirstSteps, most: int) -> list[Row]:
    optimizers = labels_in(table["optimizer"])
    valid = is_valid(first, array_of(table["session"]), optimizers, array_of(table["step"]))
    kept = np.flatnonzero(valid)[-most:]
    columns = [_objects(table[name][kept]) for name in FIELDS]
    return [Row(*values) for values in zip(*columns, strict=True)]


def _objects(column: Any) -> list[Any]:
    if isinstance(column, Labels):
        return [column.values[code] for code in column.codes]
    values: list[Any] = column.tolist()
    return values


KEPT_EVENTS = 64
"""Events that are kept; of all others only their number by kind."""
LONGEST = 1 << 20
"""Bytes of a line; a longer one is no event."""


class NewEvents:
    """The events that have come so far.

    Attributes:
        newest: The newest ones, oldest first.
        counts: By kind, of all.
    """

    def __init__(self, folder: Path) -> None:
        """Starts at the beginning.

        Args:
            folder: The run folder.
        """
        self._folder = folder / EVENTS
        self.restart()

    def restart(self) -> None:
        """Forgets all: the run was resumed, and events that were told of are void."""
        self.newest: deque[EventRow] = deque(maxlen=KEPT_EVENTS)
        self.counts: Counter[str] = Counter()
        self._offsets: dict[str, int] = {}

    def read(self, first: FirstSteps, last: Mapping[int, int]) -> deque[EventRow]:
        """Reads what has come.

        Args:
            first: Where sessions begin, if there are several.
            last: By session its newest row; events of later ones wait.

        Returns:
            The newest of the new ones.
        """
        come: deque[EventRow] = deque(maxlen=KEPT_EVENTS)
        for path in sorted(self._folder.iterdir()):
            if path.suffix == LINES and path.stem.isdigit():
                session = int(path.stem)
                for noted in self._new(path, last.get(session, -1)):
                    if valid_events(first, session, [noted]):
                        self._take(EventRow.of(noted.event), come)
        return come

    def _take(self, event: EventRow, come: deque[EventRow]) -> None:
        come.append(event)
        self.newest.append(event)
        self.counts[event.kind] += 1

    def _new(self, path: Path, last: int) -> Iterator[LoggedEvent]:
        with path.open("rb") as file:
            file.seek(self._offsets.get(path.name, 0))
            while (line := file.readline(LONGEST)).endswith(b"\n"):
                noted = event_in(line)
                if noted is not None and noted.row > last:
                    return
                self._offsets[path.name] = file.tell()
                if noted is not None:
                    yield noted


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
    events: tuple[EventRow, ...]
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

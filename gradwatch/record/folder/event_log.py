"""The events of one session, a line of JSON each: written, and read also while more come."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple

from gradwatch.record.folder.files import remove_quietly
from gradwatch.record.records import Event

SPELLED = "value_is"
"""JSON has no NaN and no Inf: such a value is null, and spelled out in this further field."""

_ROW = "row"
_SUFFIX = ".jsonl"

LONGEST_LINE = 1 << 24
"""Bytes; of a longer line the pieces are no events, so that no file fills the memory."""

_TYPES = {"int": (int,), "float": (int, float), "str": (str,), "EventKind": (str,)}
FIELD_TYPES = {field.name: _TYPES[str(field.type)] for field in fields(Event)}


class LoggedEvent(NamedTuple):
    """An event in the file of a session.

    Attributes:
        event: The event.
        row: It counts when this row of the session is there: the last step of its delivery.
    """

    event: Event
    row: int


class EventLog:
    """Appends to the file of a session that belongs to this process alone."""

    def __init__(self, folder: Path, session: int) -> None:
        """Claims the first session that nobody has.

        Args:
            folder: The folder of the events.
            session: The lowest number to claim.
        """
        while not _created(path := folder / f"{session:04d}{_SUFFIX}"):
            session += 1
        self.session, self._path, self.length = session, path, 0

    def append(self, events: Sequence[Event], row: int) -> None:
        """Writes events behind those that are there.

        Args:
            events: Some more.
            row: They count when this row of the session is there.

        Raises:
            OSError: If the disk is full, read-only or gone.
        """
        if not events:
            return
        content = lines_of(LoggedEvent(event, row) for event in events)
        with self._path.open("r+b") as file:
            # What a failed attempt has left behind the length that counts is written over.
            file.truncate(self.length)
            file.seek(self.length)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self.length += len(content)

    def give_up(self) -> None:
        """Removes the file of a session that could not begin."""
        remove_quietly(self._path)


def _created(path: Path) -> bool:
    try:
        # Creating it is the claim: of two processes that try, the file system lets one.
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def lines_of(events: Iterable[LoggedEvent]) -> bytes:
    """Writes events as lines of JSON."""
    return b"".join(_line(logged) for logged in events)


def _line(logged: LoggedEvent) -> bytes:
    content = asdict(logged.event) | {_ROW: logged.row}
    if not math.isfinite(logged.event.value):
        content |= {"value": None, SPELLED: str(float(logged.event.value))}
    return json.dumps(content, allow_nan=False).encode() + b"\n"


def event_files(folder: Path) -> list[tuple[int, Path]]:
    """Lists the sessions that have a file of events, in order, and the files.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    files = [path for path in folder.iterdir() if path.suffix == _SUFFIX]
    return sorted((int(path.stem), path) for path in files if path.stem.isdecimal())


def read_events(path: Path, offset: int = 0) -> Iterator[tuple[LoggedEvent, int]]:
    """Yields the events of a session, each with the offset in the file that follows it.

    Args:
        path: The file.
        offset: Where to begin: 0, or what came with an event.
    """
    with path.open("rb") as file:
        file.seek(offset)
        while line := file.readline(LONGEST_LINE):
            offset += len(line)
            # A line that is torn, because the process was killed in the middle or is still at it,
            # is no event; who comes back for more begins behind the last one that was.
            if (logged := event_in(line)) is not None:
                yield logged, offset


def event_in(line: bytes) -> LoggedEvent | None:
    """Reads a line of JSON; None of one that is torn, or holds something else."""
    try:
        content = json.loads(line)
        spelled = content.pop(SPELLED, None)
        if spelled is not None:
            content["value"] = float(spelled)
        event = Event(**{name: content[name] for name in FIELD_TYPES})
        return LoggedEvent(event, content[_ROW]) if _is_sound(event, content[_ROW]) else None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None


def _is_sound(event: Event, row: object) -> bool:
    """Tells whether each field is what it must be, so that who reads events need not ask."""
    # type() and not isinstance(): True is an int too.
    return type(row) is int and all(
        type(getattr(event, name)) in types for name, types in FIELD_TYPES.items()
    )

"""Writes and reads the events of one session, one line of JSON each, also while the run goes on."""

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
"""JSON has no NaN and no Inf: such a value is null, and this extra field holds it as text."""

_ROW = "row"
_SUFFIX = ".jsonl"

LONGEST_LINE = 1 << 24
"""Bytes. A longer line is read in pieces, which are not events: no file can fill the memory."""

_TYPES = {"int": (int,), "float": (int, float), "str": (str,), "EventKind": (str,)}
FIELD_TYPES = {field.name: _TYPES[str(field.type)] for field in fields(Event)}


class LoggedEvent(NamedTuple):
    """An event in the file of a session.

    Attributes:
        row: The event counts once this row of the session, the last of its batch, is written.
    """

    event: Event
    row: int


class EventLog:
    """Appends events to the file of a session that belongs to this process alone."""

    def __init__(self, folder: Path, session: int) -> None:
        """Claims the first free session number.

        Args:
            folder: The ``events`` folder of the run.
            session: The lowest number to claim.
        """
        while not _created(path := folder / f"{session:04d}{_SUFFIX}"):
            session += 1
        self.session, self._path, self.length = session, path, 0

    def append(self, events: Sequence[Event], row: int) -> None:
        """Appends events to the file and syncs it to disk.

        Args:
            events: May be empty; then nothing is written.
            row: The events count once this row of the session is written.

        Raises:
            OSError: If the disk is full, read-only or gone.
        """
        if not events:
            return
        content = lines_of(LoggedEvent(event, row) for event in events)
        with self._path.open("r+b") as file:
            # A failed attempt may have left bytes after the valid length: overwrite them.
            file.truncate(self.length)
            file.seek(self.length)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self.length += len(content)

    def give_up(self) -> None:
        """Removes the file, for a session that could not start."""
        remove_quietly(self._path)


def _created(path: Path) -> bool:
    try:
        # Creating the file claims the session: of two processes that try, only one succeeds.
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
    """Lists ``(session, file)`` for each session that has a file of events, by session.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    files = [path for path in folder.iterdir() if path.suffix == _SUFFIX]
    return sorted((int(path.stem), path) for path in files if path.stem.isdecimal())


def read_events(path: Path, offset: int = 0) -> Iterator[tuple[LoggedEvent, int]]:
    """Yields the events of a session, each with the offset of the byte after it.

    Args:
        path: The session's ``.jsonl`` file.
        offset: Where to begin, in bytes: 0, or the offset that came with an event.
    """
    with path.open("rb") as file:
        file.seek(offset)
        while line := file.readline(LONGEST_LINE):
            offset += len(line)
            # A line may be incomplete: the process was killed while writing it, or is still
            # writing. It yields no offset: the next read begins after the last complete event.
            if (logged := event_in(line)) is not None:
                yield logged, offset


def event_in(line: bytes) -> LoggedEvent | None:
    """Reads an event from a line of JSON; None if the line is incomplete or not an event."""
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
    """Tells whether each field has the right type, so that readers need not check."""
    # type() and not isinstance(): True would pass as an int.
    return type(row) is int and all(
        type(getattr(event, name)) in types for name, types in FIELD_TYPES.items()
    )

"""EventLog: the events of one session, a line of JSON each."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

from gradwatch.record.records import Event

_FIELDS = tuple(field.name for field in fields(Event))
_SPELLED = "value_is"
"""JSON has no NaN and no Inf: such a value is null, and spelled out in this further field."""

_WHOLE = ("step", "micro_batch", "rank", "nan_count", "inf_count", "global_step")
_TEXTS = ("kind", "parameter", "module", "message", "optimizer")
_ROW = "row"
LINES = ".jsonl"
"""Ends the name of a file of events."""


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
            session: The lowest number to take.
        """
        self.session = session
        while not self._claimed(folder / f"{self.session:04d}{LINES}"):
            self.session += 1
        self._path = folder / f"{self.session:04d}{LINES}"
        self.length = 0

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
        with suppress(OSError):
            self._path.unlink()

    @staticmethod
    def _claimed(path: Path) -> bool:
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def lines_of(events: Iterable[LoggedEvent]) -> bytes:
    """Writes events as lines of JSON.

    Args:
        events: The events.
    """
    lines = (json.dumps(_plain(noted), allow_nan=False) + "\n" for noted in events)
    return "".join(lines).encode()


def read_events(path: Path) -> list[LoggedEvent]:
    """Reads the events of a session.

    Args:
        path: The file.

    Returns:
        The events; a line that is torn, because the process was killed in the middle, is no event.
    """
    lines = path.read_bytes().split(b"\n")
    return [noted for noted in map(event_in, lines) if noted is not None]


def event_in(line: bytes) -> LoggedEvent | None:
    """Reads a line of JSON.

    Args:
        line: With or without its line break.

    Returns:
        The event; None of a line that is torn, or holds something else.
    """
    try:
        content = json.loads(line)
        spelled = content.pop(_SPELLED, None)
        if spelled is not None:
            content["value"] = float(spelled)
        event = Event(**{name: content[name] for name in _FIELDS})
        return LoggedEvent(event, content[_ROW]) if _is_sound(event, content[_ROW]) else None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None


def _is_sound(event: Event, row: object) -> bool:
    """Tells whether each field is what it must be, so that who reads events need not ask."""
    whole = (row, *(getattr(event, name) for name in _WHOLE))
    texts = (getattr(event, name) for name in _TEXTS)
    return (
        all(type(value) is int for value in whole)
        and all(type(text) is str for text in texts)
        and type(event.value) in (int, float)
    )


def _plain(noted: LoggedEvent) -> dict[str, Any]:
    content = asdict(noted.event) | {_ROW: noted.row}
    if not math.isfinite(noted.event.value):
        content |= {"value": None, _SPELLED: str(float(noted.event.value))}
    return content

"""EventLog: the events of one session, a line of JSON each."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from gradwatch.record.event import Event

_FIELDS = tuple(field.name for field in fields(Event))
_SPELLED = "value_is"
"""JSON has no NaN and no Inf: such a value is null, and spelled out in this further field."""


class EventLog:
    """Appends to the file of a session that belongs to this process alone."""

    def __init__(self, folder: Path, session: int) -> None:
        """Claims the first session that nobody has.

        Args:
            folder: The folder of the events.
            session: The lowest number to take.
        """
        self.session = session
        while not self._claimed(folder / f"{self.session:04d}.jsonl"):
            self.session += 1
        self._path = folder / f"{self.session:04d}.jsonl"
        self.length = 0

    def append(self, events: Sequence[Event]) -> None:
        """Writes events behind those that are there.

        Args:
            events: Some more.

        Raises:
            OSError: If the disk is full, read-only or gone.
        """
        if not events:
            return
        content = "".join(map(event_line, events)).encode()
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


def event_line(event: Event) -> str:
    """Writes an event as a line of JSON, line feed included.

    Args:
        event: The event.
    """
    content = plain_event(event)
    return json.dumps(content, allow_nan=False) + "\n"


def plain_event(event: Event) -> dict[str, Any]:
    """Returns the fields of an event in terms of JSON.

    Args:
        event: The event.
    """
    content = asdict(event)
    if not math.isfinite(event.value):
        content |= {"value": None, _SPELLED: str(float(event.value))}
    return content


def read_events(path: Path) -> list[Event]:
    """Reads the events of a session.

    Args:
        path: The file.

    Returns:
        The events; a line that is torn, because the process was killed in the middle, is no event.
    """
    lines = path.read_bytes().split(b"\n")
    return [event for event in map(_event, lines) if event is not None]


def lines_of(events: Iterable[Event]) -> bytes:
    """Writes events as lines of JSON.

    Args:
        events: The events.
    """
    return "".join(map(event_line, events)).encode()


def _event(line: bytes) -> Event | None:
    try:
        content = json.loads(line)
        spelled = content.pop(_SPELLED, None)
        if spelled is not None:
            content["value"] = float(spelled)
        return Event(**{name: content[name] for name in _FIELDS})
    except (ValueError, KeyError, AttributeError, TypeError):
        return None

"""Which rank a NaN came from: each rank but the first notes its own beside the run folder's tables.

The first rank, which writes the tables, sees after the reduction that a gradient is not finite, but
not whose it was. To tell it while the training runs would take a collective. So a rank whose own
gradient was not finite appends a line of JSON to ``ranks/RANK.jsonl``, and a reader joins the two::

    {"time": 1760000000.0, "rank": 1, "optimizer": "SGD", "step": 5}

The time says which session it belongs to, as steps may be counted from 1 again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from gradwatch.record.events import with_rank
from gradwatch.record.folder.event_log import LONGEST_LINE
from gradwatch.record.records import Event

RANKS = "ranks"
MOST_LINES = 1_000  # of one process; a run whose every step is bad needs no more to be understood
CLOCKS_S = 5.0  # by how much the clocks of two machines may differ


class Note(NamedTuple):
    """A step in which a rank's own gradient was not finite.

    Attributes:
        time: When it was written, in seconds since 1970.
        rank: The rank.
        optimizer: Label of the optimizer.
        step: Its step, counted from 1.
    """

    time: float
    rank: int
    optimizer: str
    step: int


class RankLog:
    """What one rank notes of its own gradients; a disk that fails costs only these notes."""

    def __init__(self, folder: str | os.PathLike[str], rank: int) -> None:
        """Writes nothing yet; ``folder`` is the run folder, which the first rank writes."""
        self._path = Path(folder) / RANKS / f"{rank}.jsonl"
        self._rank = rank
        self._lines = 0

    def note(self, events: Sequence[Event]) -> None:
        """Notes events that say that this rank's own gradient was not finite."""
        for event in events:
            if event.nonfinite and event.rank == self._rank and self._lines < MOST_LINES:
                self._lines += 1
                note = Note(time.time(), self._rank, event.optimizer, event.step)
                with suppress(OSError):
                    self._append(json.dumps(note._asdict()).encode() + b"\n")

    def _append(self, line: bytes) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            file.write(line)


class RankNotes:
    """What all ranks have noted, for the events of the first rank."""

    def __init__(self, folder: Path, sessions: Sequence[Mapping[str, Any]]) -> None:
        """Reads the notes; ``sessions`` are those of meta.json."""
        begun = sorted(
            (began, int(number))
            for one in sessions
            if (began := _seconds(one.get("started"))) is not None
            and isinstance(number := one.get("session"), int)
        )
        self._ranks: dict[tuple[int, str, int], int] = {}
        for note in _notes(folder / RANKS):
            session = max((one for one in begun if one[0] <= note.time + CLOCKS_S), default=None)
            if session is not None:
                key = (session[1], note.optimizer, note.step)
                self._ranks[key] = min(self._ranks.get(key, note.rank), note.rank)

    def traced(self, session: int, event: Event) -> Event:
        """Returns an event of a session with the rank that its NaN came from, if that is known."""
        rank = self._ranks.get((session, event.optimizer, event.step))
        if rank is None or event.rank >= 0:
            return event
        return with_rank(event, rank)


def _seconds(started: object) -> float | None:
    try:
        return datetime.fromisoformat(str(started)).timestamp()
    except ValueError:
        return None


def _notes(folder: Path) -> Iterator[Note]:
    for path in sorted(folder.glob("*.jsonl")):
        with suppress(OSError), path.open("rb") as file:
            while line := file.readline(LONGEST_LINE):
                note = _note_in(line)
                if note is not None:
                    yield note


def _note_in(line: bytes) -> Note | None:
    try:
        content = json.loads(line)
        note = Note(**{name: content[name] for name in Note._fields})
    except (ValueError, KeyError, TypeError, RecursionError):
        return None  # incomplete: the process is writing it, or was killed
    kinds = tuple(map(type, note))
    return note if kinds == (float, int, str, int) and note.rank >= 0 else None

"""Which rank a NaN came from: each rank but the first notes its own beside the run folder's tables.

The first rank, which writes the tables, sees after the reduction that a gradient is not finite, but
not whose it was. To tell it while the training runs would take a collective. So a rank whose own
gradient was not finite appends its own event to ``ranks/RANK.jsonl``, and a reader shows that
instead of what the first rank saw. A line is that of an event log (:mod:`.event_log`), and the time
beside it, which says what session it belongs to, as steps may be counted from 1 again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from gradwatch.record.events import with_rank
from gradwatch.record.folder.event_log import LONGEST_LINE, LoggedEvent, event_in, lines_of
from gradwatch.record.records import Event

RANKS = "ranks"
MOST_LINES = 1_000  # of one process; a run whose every step is bad needs no more to be understood
CLOCKS_S = 5.0  # by how much the clocks of two machines may differ


class Note(NamedTuple):
    """What a rank saw in a step in which its own gradient was not finite.

    Attributes:
        time: When it was written, in seconds since 1970.
        event: The event of that rank.
    """

    time: float
    event: Event


class RankLog:
    """What one rank notes of its own gradients; a disk that fails costs only these notes."""

    def __init__(self, folder: str | os.PathLike[str], rank: int, *, waits: bool = False) -> None:
        """Writes nothing yet.

        Args:
            folder: The run folder, which the first rank writes.
            rank: Rank of this process.
            waits: Whether to keep the notes in memory until :meth:`begin`.
        """
        self._rank = rank
        self.move(folder)
        self._lines = 0
        self._waiting: list[bytes] | None = [] if waits else None

    def move(self, folder: str | os.PathLike[str]) -> None:
        """Names another run folder, before :meth:`begin`."""
        self._path = Path(folder) / RANKS / f"{self._rank}.jsonl"

    def note(self, events: Sequence[Event]) -> None:
        """Notes events that say that this rank's own gradient was not finite."""
        for event in events:
            if event.nonfinite and event.rank == self._rank and self._lines < MOST_LINES:
                self._lines += 1
                content = json.loads(lines_of([LoggedEvent(event, 0)])) | {"time": time.time()}
                self._append(json.dumps(content).encode() + b"\n")

    def begin(self) -> None:
        """Writes what has waited; from now on notes are written at once."""
        waiting, self._waiting = self._waiting, None
        for line in waiting or ():
            self._append(line)

    def _append(self, line: bytes) -> None:
        if self._waiting is not None:
            self._waiting.append(line)
            return
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                file.write(line)


class SessionTimes:
    """Which session something was written in, by the time of it."""

    def __init__(self, begun: Iterable[tuple[float, int]]) -> None:
        """Takes when each session began, in seconds since 1970, and its number."""
        self._begun = sorted(begun)

    @classmethod
    def of(cls, sessions: Sequence[Mapping[str, Any]]) -> SessionTimes:
        """Reads when the sessions of meta.json began."""
        return cls(
            (began, int(number))
            for one in sessions
            if (began := _seconds(one.get("started"))) is not None
            and isinstance(number := one.get("session"), int)
        )

    def at(self, time_s: float, *, of_another_rank: bool) -> int | None:
        """Returns the number of the session at a time, seconds since 1970; None before the first.

        The clock of another rank than the first, which notes the beginnings, may differ from its.
        """
        latest = time_s + (CLOCKS_S if of_another_rank else 0.0)
        return max((one for one in self._begun if one[0] <= latest), default=(0.0, None))[1]


class RankNotes:
    """What all ranks have noted, for the events of the first rank."""

    def __init__(self, folder: Path, sessions: Sequence[Mapping[str, Any]]) -> None:
        """Reads the notes; ``sessions`` are those of meta.json."""
        times = SessionTimes.of(sessions)
        self._events: dict[tuple[int, str, int], Event] = {}
        for note in _notes(folder / RANKS):
            session = times.at(note.time, of_another_rank=True)
            if session is not None:
                event = note.event
                key = (session, event.optimizer, event.step)
                self._events[key] = min(self._events.get(key, event), event, key=_rank_of)

    def traced(self, session: int, event: Event) -> Event:
        """Returns an event of a session as the rank saw that its NaN came from, if one did."""
        seen = self._events.get((session, event.optimizer, event.step))
        if seen is None or event.rank >= 0:
            return event
        # That rank knows the micro-batch, and whether its weights were bad before.
        told = replace(seen, global_step=event.global_step) if event.nonfinite else event
        return with_rank(told, seen.rank)


_rank_of = attrgetter("rank")


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
    logged = event_in(line)
    if logged is None or logged.event.rank < 0:
        return None  # incomplete: the process is writing it, or was killed
    written = json.loads(line).get("time")
    return Note(written, logged.event) if type(written) is float else None

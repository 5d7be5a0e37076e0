"""Reads the events of a run line by line, each once, and keeps the newest."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from pathlib import Path

from gradwatch.commands.live.row import Happening
from gradwatch.record.folder.event_log import LINES, Noted, event_in
from gradwatch.record.folder.meta import EVENTS
from gradwatch.record.folder.resume import FirstSteps, valid_events

KEPT = 64
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
        self.newest: deque[Happening] = deque(maxlen=KEPT)
        self.counts: Counter[str] = Counter()
        self._offsets: dict[str, int] = {}

    def read(self, first: FirstSteps, last: Mapping[int, int]) -> deque[Happening]:
        """Reads what has come.

        Args:
            first: Where sessions begin, if there are several.
            last: By session its newest row; events of later ones wait.

        Returns:
            The newest of the new ones.
        """
        come: deque[Happening] = deque(maxlen=KEPT)
        for path in sorted(self._folder.iterdir()):
            if path.suffix == LINES and path.stem.isdigit():
                session = int(path.stem)
                for noted in self._new(path, last.get(session, -1)):
                    if valid_events(first, session, [noted]):
                        self._take(Happening.of(noted.event), come)
        return come

    def _take(self, event: Happening, come: deque[Happening]) -> None:
        come.append(event)
        self.newest.append(event)
        self.counts[event.kind] += 1

    def _new(self, path: Path, last: int) -> Iterator[Noted]:
        with path.open("rb") as file:
            file.seek(self._offsets.get(path.name, 0))
            while (line := file.readline(LONGEST)).endswith(b"\n"):
                noted = event_in(line)
                if noted is not None and noted.row > last:
                    return
                self._offsets[path.name] = file.tell()
                if noted is not None:
                    yield noted

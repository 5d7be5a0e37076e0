"""EventLog: what happened, for the Gradients tab, all of it as far as a run can show it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from gradwatch.record.event import Event
from gradwatch_dashboard.wire import Tag
from gradwatch_tensorboard.tensors import Outgoing, text_event

MAX_EVENTS = 10_000
"""Events that are listed one by one."""

LEFT_OUT = "left_out"
"""Kind of the entry that stands for the rest."""

ONLY_FIRST = "More events followed; only the first {limit:,} are listed."
LEFT_OUT_KINDS = "{total:,} more events are not listed: {kinds}."


class EventLog:
    """Lists the first events, then counts.

    One entry says so as soon as an event is left out, in case the process is killed, and a second
    one at the end how many there were of each kind.
    """

    def __init__(self) -> None:
        """Starts without an event."""
        self._listed = 0
        self._left_out: Counter[str] = Counter()
        self._newest: Event | None = None
        self._session = ""
        self._step = -1
        self._time = 0.0

    def add(self, events: Sequence[Event], session: str, time: float) -> list[Outgoing]:
        """Takes events.

        Args:
            events: Oldest first.
            session: The session that they are of.
            time: Wall time in seconds since 1970.

        Returns:
            What is to be written now.
        """
        if not events:
            return []
        room = MAX_EVENTS - self._listed
        listed, rest = events[:room], events[room:]
        self._listed += len(listed)
        entries = [asdict(event) for event in listed]
        if rest:
            self._newest = rest[-1]
            if not self._left_out:
                entries.append(self._last_entry(ONLY_FIRST.format(limit=MAX_EVENTS), len(rest)))
            self._left_out.update(event.kind for event in rest)
        if not entries:
            return []
        first = min(event.global_step for event in listed or rest)
        return [self._outgoing(entries, first, session, time)]

    def rest(self) -> list[Outgoing]:
        """Returns what is to be written at the end: how many events were left out."""
        if self._newest is None:
            return []
        total = self._left_out.total()
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self._left_out.most_common())
        entry = self._last_entry(LEFT_OUT_KINDS.format(total=total, kinds=kinds), total)
        step, session, self._newest = self._newest.global_step, self._session, None
        return [self._outgoing([entry], step, session, self._time)]

    def _last_entry(self, message: str, count: int) -> dict[str, Any]:
        newest = {} if self._newest is None else asdict(self._newest)
        nothing = {"parameter": "", "module": "", "nan_count": 0, "inf_count": 0, "micro_batch": 0}
        return newest | nothing | {"kind": LEFT_OUT, "value": float(count), "message": message}

    def _outgoing(
        self, entries: Sequence[dict[str, Any]], step: int, session: str, time: float
    ) -> Outgoing:
        begins = session != self._session
        self._step = step if begins else max(step, self._step + 1)
        self._session = session
        self._time = max(self._time, time)
        texts = [json.dumps(entry) for entry in entries]
        event = text_event(Tag("events", session), texts, described=not begins)
        return Outgoing(event, self._step, self._time)

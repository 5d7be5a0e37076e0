"""Events: the first ones in full, as Markdown text and as JSON for the Gradients tab."""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from gradwatch import Event
from gradwatch.adapters import EVENT_KINDS
from gradwatch_dashboard.wire import OTHER_LOOK, Tag
from gradwatch_tensorboard.messages import Outgoing, text_event

MAX_TEXT_EVENTS = 20
"""Events listed in the text: the first ones, because later ones often follow from them."""

MAX_LENGTH = 300
"""Characters shown of one name or message."""

MAX_TAB_EVENTS = 10_000
"""Events of a session that the tab lists individually."""

LEFT_OUT = "left_out"
"""Kind of the entry that counts the events not listed."""

ONLY_FIRST = "More events followed; only the first {limit:,} are listed."
LEFT_OUT_KINDS = "{total:,} more events are not listed: {kinds}."

_OF_THE_RUN = "none"  # the label of events that belong to no optimizer, as in accumulation
_MARKDOWN = re.compile(r"[\\`*_\[\]|~]")
_MORE = (
    f"\n\n*More events followed; only the first {MAX_TEXT_EVENTS} are listed here. "
    "`watcher.history.events()` has those that the buffer holds.*"
)


class EventText:
    """Collects the first events of a run as the lines of a Markdown list."""

    def __init__(self) -> None:
        """Starts without events."""
        self._lines: list[str] = []
        self._complete = False

    def add(self, events: Sequence[Event], first_optimizer: str) -> str | None:
        """Adds the events of one batch.

        Args:
            events: The events, oldest first.
            first_optimizer: Label of the first optimizer, which the lines do not mention.

        Returns:
            The whole list so far, as Markdown; None if nothing is added to it.
        """
        if not events or self._complete:
            return None
        room = MAX_TEXT_EVENTS - len(self._lines)
        self._lines += [_line(event, first_optimizer) for event in events[:room]]
        self._complete = len(events) > room
        # The whole list each time: TensorBoard keeps a random 10 texts of a tag, and the last one.
        return "\n".join(self._lines) + (_MORE if self._complete else "")


def _line(event: Event, first_optimizer: str) -> str:
    # Most messages name the parameter themselves.
    named = not event.parameter or event.parameter in event.message
    where = [] if named else [escape(event.parameter)]
    if event.optimizer not in (first_optimizer, _OF_THE_RUN):
        where.append(escape(event.optimizer))
    place = f" ({', '.join(where)})" if where else ""
    return f"* step {event.global_step}, **{escape(event.kind)}**{place}: {escape(event.message)}"


def escape(text: str) -> str:
    r"""Makes a string safe to use within one line of Markdown.

    Control characters, including those that change the writing direction, become U+FFFD.

    >>> escape("block_0.__init__ <b>")
    'block\\_0.\\_\\_init\\_\\_ &lt;b&gt;'
    """
    if len(text) > MAX_LENGTH:
        text = text[: MAX_LENGTH - 1] + "…"
    text = "".join(" " if c in "\n\r\t" else _visible(c) for c in text)
    return _MARKDOWN.sub(_escaped, html.escape(text, quote=False))


def _visible(character: str) -> str:
    category = unicodedata.category(character)
    return "\ufffd" if category.startswith("C") or category in ("Zl", "Zp") else character


def _escaped(match: re.Match[str]) -> str:
    character = match.group()
    return f"&#{ord(character)};" if character in "|~" else "\\" + character


def _look(kind: str) -> dict[str, str]:
    declared = EVENT_KINDS.get(kind)
    color, shape = OTHER_LOOK if declared is None else (declared.color, declared.shape)
    return {"color": color, "shape": shape}


class EventList:
    """Lists the first events for the Gradients tab and counts the others as ``left_out``.

    :mod:`gradwatch_dashboard.wire` describes the format.
    """

    def __init__(self) -> None:
        """Starts without events."""
        self._listed = 0
        self._left_out: Counter[str] = Counter()
        self._newest: Event | None = None
        self._session = ""
        self._step = -1
        self._time = 0.0

    def add(self, events: Sequence[Event], session: str, time: float) -> list[Outgoing]:
        """Adds the events of one batch, oldest first, and returns the Events to write now.

        ``time`` is the wall time of these Events, in seconds since 1970.
        """
        if not events:
            return []
        room = MAX_TAB_EVENTS - self._listed
        listed, rest = events[:room], events[room:]
        self._listed += len(listed)
        entries = [asdict(event) | _look(event.kind) for event in listed]
        if rest:
            self._newest = rest[-1]
            if not self._left_out:  # now, because a killed process never calls rest()
                entries.append(self._last_entry(ONLY_FIRST.format(limit=MAX_TAB_EVENTS), len(rest)))
            self._left_out.update(event.kind for event in rest)
        if not entries:
            return []
        first = min(event.global_step for event in listed or rest)
        return [self._outgoing(entries, first, session, time)]

    def rest(self) -> list[Outgoing]:
        """Returns the Event to write at the end: how many events were left out, if any."""
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
        entry = {"kind": LEFT_OUT, "value": float(count), "message": message}
        return newest | nothing | entry | _look(LEFT_OUT)

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

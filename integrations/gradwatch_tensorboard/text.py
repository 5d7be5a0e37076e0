"""Text: the first events as a Markdown list that no name in it can break out of."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Sequence

from gradwatch.record.records import Event

MAX_EVENTS = 20
"""Events that are listed; where there are more, the first ones tell the story."""

MAX_LENGTH = 300
"""Characters of one name or message that are shown."""

_OF_THE_RUN = "none"  # accumulation has events that are of no optimizer
_MARKDOWN = re.compile(r"[\\`*_\[\]|~]")
_MORE = (
    f"\n\n*More events followed; only the first {MAX_EVENTS} are listed here. "
    "`watcher.history.events()` has those that the buffer holds.*"
)


def escape(text: str) -> str:
    r"""Makes a string safe as a piece of one line of Markdown.

    Args:
        text: Any string, a parameter's name say.

    Returns:
        Markdown that shows the string, on one line, as it is. Control characters, also those that
        turn the direction of writing, are shown as U+FFFD.

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


class EventText:
    """Gathers the first events of a run as lines of one list."""

    def __init__(self) -> None:
        """Starts without an event."""
        self._lines: list[str] = []
        self._complete = False

    def add(self, events: Sequence[Event], first_optimizer: str) -> str | None:
        """Takes the events of one batch.

        The list is given whole each time: TensorBoard keeps 10 texts of a tag at random and always
        the last one, so that the last one has to say everything.

        Args:
            events: Oldest first.
            first_optimizer: Label that goes without saying.

        Returns:
            The list so far as Markdown; None where nothing is to be added to it.
        """
        if not events or self._complete:
            return None
        room = MAX_EVENTS - len(self._lines)
        self._lines += [_line(event, first_optimizer) for event in events[:room]]
        self._complete = len(events) > room
        return "\n".join(self._lines) + (_MORE if self._complete else "")


def _line(event: Event, first_optimizer: str) -> str:
    # Most messages name the parameter themselves.
    named = not event.parameter or event.parameter in event.message
    where = [] if named else [escape(event.parameter)]
    if event.optimizer not in (first_optimizer, _OF_THE_RUN):
        where.append(escape(event.optimizer))
    place = f" ({', '.join(where)})" if where else ""
    return f"* step {event.global_step}, **{escape(event.kind)}**{place}: {escape(event.message)}"

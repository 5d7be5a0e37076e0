"""What a request asks for, checked; and what cannot be read, said once in the log."""

from __future__ import annotations

import logging
import re
import threading
from typing import Any

from tensorboard import errors

MAX_NOTES = 200
"""Different notes of a process; a log of damaged files need not fill the terminal."""

_MAX_CHARACTERS = 120
_logger = logging.getLogger("gradwatch_dashboard")
_lock = threading.Lock()
_seen: set[tuple[str, ...]] = set()


def note(message: str, *details: object) -> None:
    """Writes a warning, unless the same was written before.

    Args:
        message: With a ``%s`` for each detail.
        details: What the message is about, possibly a stranger's text.
    """
    entry = (message, *map(shown, details))
    with _lock:
        if entry in _seen or len(_seen) >= MAX_NOTES:
            return
        _seen.add(entry)
    _logger.warning(*entry)


def shown(text: object) -> str:
    """Makes a text fit for one line of a log or an error.

    Args:
        text: Of any length, with any characters.
    """
    line = repr(text)
    return line if len(line) <= _MAX_CHARACTERS else f"{line[:_MAX_CHARACTERS]}..."


MAX_CHARACTERS = 1000
"""Longer names are cut: a browser has to lay them out."""


def fit_name(name: str) -> str:
    """Cuts what is too long and replaces what no UTF-8 text can hold.

    Args:
        name: Any text.

    >>> fit_name("layer.weight")
    'layer.weight'
    """
    if len(name) > MAX_CHARACTERS:
        name = f"{name[:MAX_CHARACTERS]}..."
    return name.encode("utf-8", "replace").decode()


LIMIT = 10**18
"""No step is larger, nor further below 0."""

_INTEGER = re.compile(r"-?[0-9]{1,18}")
_MISSING = "{name} is missing. Write {name}=..."
_REPEATED = "{name} must be given once, got it {count} times"
_EMPTY = "{name} must not be empty"
_NO_INTEGER = "{name} must be a whole number of at most 18 digits, got {value}"
_BACKWARDS = "first must not be more than last, got first={first} and last={last}"


class Arguments:
    """The arguments of one request."""

    def __init__(self, values: Any) -> None:
        """Takes them.

        Args:
            values: A werkzeug ``MultiDict``.
        """
        self._values = values

    def text(self, name: str) -> str:
        """Reads an argument that has to be there.

        Args:
            name: Its name.

        Raises:
            errors.InvalidArgumentError: If it is missing, repeated or empty.
        """
        value = self._only(name)
        if value is None:
            raise errors.InvalidArgumentError(_MISSING.format(name=name))
        if not value:
            raise errors.InvalidArgumentError(_EMPTY.format(name=name))
        return value

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        """Reads a whole number.

        Args:
            name: Its name.
            default: What it is where it is left out.
            low: The least; what is less counts as this.
            high: The most; what is more counts as this.

        Raises:
            errors.InvalidArgumentError: If it is repeated, or no whole number.
        """
        value = self._only(name)
        if value is None:
            return min(max(default, low), high)
        if not _INTEGER.fullmatch(value):
            raise errors.InvalidArgumentError(_NO_INTEGER.format(name=name, value=shown(value)))
        return min(max(int(value), low), high)

    def range(self, low: int, high: int) -> tuple[int, int]:
        """Reads ``first`` and ``last``, clamped to what there is.

        Args:
            low: The first step that there is, and the default of ``first``.
            high: The last step that there is, and the default of ``last``.

        Raises:
            errors.InvalidArgumentError: If one is malformed, or both are the wrong way round.
        """
        first = self.integer("first", -LIMIT, -LIMIT, LIMIT)
        last = self.integer("last", LIMIT, -LIMIT, LIMIT)
        if first > last:
            raise errors.InvalidArgumentError(_BACKWARDS.format(first=first, last=last))
        return min(max(first, low), high), min(max(last, low), high)

    def _only(self, name: str) -> str | None:
        values: list[str] = self._values.getlist(name)
        if len(values) > 1:
            raise errors.InvalidArgumentError(_REPEATED.format(name=name, count=len(values)))
        return values[0] if values else None

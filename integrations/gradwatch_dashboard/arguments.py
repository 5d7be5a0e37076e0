"""Arguments: reads and checks the query arguments of a request."""

from __future__ import annotations

import re
from typing import Any

from tensorboard import errors

from gradwatch_dashboard.untrusted import shown

LIMIT = 10**18
"""The largest step that is accepted; the smallest is its negative."""

_INTEGER = re.compile(r"-?[0-9]{1,18}")
_MISSING = "{name} is missing. Write {name}=..."
_REPEATED = "{name} must be given once, got it {count} times"
_EMPTY = "{name} must not be empty"
_NO_INTEGER = "{name} must be a whole number of at most 18 digits, got {value}"
_BACKWARDS = "first must not be more than last, got first={first} and last={last}"


class Arguments:
    """The query arguments of one request."""

    def __init__(self, values: Any) -> None:
        """Wraps ``values``, a werkzeug ``MultiDict``."""
        self._values = values

    def text(self, name: str) -> str:
        """Reads a required argument.

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
        """Reads a whole number, clamped to ``low`` and ``high``.

        Raises:
            errors.InvalidArgumentError: If it is repeated, or not a whole number.
        """
        value = self._only(name)
        if value is None:
            return min(max(default, low), high)
        # Not int() alone: it accepts "1_0" and digits of any script, and refuses over 4,300 digits.
        if not _INTEGER.fullmatch(value):
            raise errors.InvalidArgumentError(_NO_INTEGER.format(name=name, value=shown(value)))
        return min(max(int(value), low), high)

    def range(self, low: int, high: int) -> tuple[int, int]:
        """Reads ``first`` and ``last``, clamped to ``low`` and ``high``, which are the defaults.

        Raises:
            errors.InvalidArgumentError: If one is malformed, or ``first`` is more than ``last``.
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

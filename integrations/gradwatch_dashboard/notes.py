"""Notes: what cannot be read is said once in TensorBoard's log, not at every request."""

from __future__ import annotations

import logging
import threading

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

"""Untrusted text from a file or a request: makes it safe for a line of the log and a browser."""

from __future__ import annotations

import logging
import threading

MAX_NOTES = 200
"""Distinct warnings per process, so that damaged files do not flood the terminal."""

_LINE_CHARACTERS = 120
_logger = logging.getLogger("gradwatch_dashboard")
_lock = threading.Lock()  # TensorBoard answers each request in a thread
_seen: set[tuple[str, ...]] = set()


def note(message: str, *details: object) -> None:
    """Logs a warning, unless the same one was logged before.

    Args:
        message: A format with one ``%s`` per detail.
        details: Values for the format, which may be untrusted text.
    """
    entry = (message, *map(shown, details))
    with _lock:
        if entry in _seen or len(_seen) >= MAX_NOTES:
            return
        _seen.add(entry)
    _logger.warning(*entry)


def shown(text: object) -> str:
    """Returns the ``repr`` of a value, cut to fit in one line of a log or an error message."""
    line = repr(text)
    return line if len(line) <= _LINE_CHARACTERS else f"{line[:_LINE_CHARACTERS]}..."


MAX_NAME = 1000
"""Characters of a name; longer names are cut, because a browser has to lay them out."""


def fit_name(name: str) -> str:
    """Cuts a long name, and replaces characters that UTF-8 cannot encode.

    >>> fit_name("layer.weight")
    'layer.weight'
    """
    if len(name) > MAX_NAME:
        name = f"{name[:MAX_NAME]}..."
    return name.encode("utf-8", "replace").decode()

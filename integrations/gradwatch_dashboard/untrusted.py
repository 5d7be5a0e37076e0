"""Untrusted text, out of a file or a request: made fit for a line of the log and for a browser."""

from __future__ import annotations

import logging
import threading

MAX_NOTES = 200
"""Different notes of a process; a log of damaged files need not fill the terminal."""

_LINE_CHARACTERS = 120
_logger = logging.getLogger("gradwatch_dashboard")
_lock = threading.Lock()  # TensorBoard answers each request in a thread
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
    """Makes a text of any length and any characters fit for one line of a log or an error."""
    line = repr(text)
    return line if len(line) <= _LINE_CHARACTERS else f"{line[:_LINE_CHARACTERS]}..."


MAX_NAME = 1000
"""Longer names are cut: a browser has to lay them out."""


def fit_name(name: str) -> str:
    """Cuts what is too long and replaces what no UTF-8 text can hold.

    >>> fit_name("layer.weight")
    'layer.weight'
    """
    if len(name) > MAX_NAME:
        name = f"{name[:MAX_NAME]}..."
    return name.encode("utf-8", "replace").decode()

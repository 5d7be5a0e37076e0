"""Ends what is still open when the interpreter exits, and leaves it to the parent in a fork."""

from __future__ import annotations

import atexit
import os
from typing import Protocol
from weakref import WeakSet

from gradwatch.errors import described_error, warn_safely

NOT_ENDED = "gradwatch could not end the watching, because of {error}."


class Open(Protocol):
    """Something that delivers when it is closed, such as an attached watcher."""

    def close(self) -> None:
        """Ends it; safe to call again."""

    def disown(self) -> None:
        """Leaves all deliveries to the process that this one was forked from."""


_open: WeakSet[Open] = WeakSet()  # whoever forgets to close must not keep a model in memory
_ended_by_owner: WeakSet[Open] = WeakSet()


def left_to_owner(one: Open) -> None:
    """Leaves the end of an open object to what has made it; in a fork it is still disowned."""
    _ended_by_owner.add(one)


def opened(one: Open) -> None:
    """Has an object closed at the exit of the interpreter, if it still exists by then."""
    _open.add(one)
    # Registered anew each time: the last one registered runs first. A sink may rely on something
    # that ends at the exit as well (a logger's connection, a temporary folder) and that is most
    # often there before the watcher.
    atexit.unregister(_close_all)
    atexit.register(_close_all)


def closed(one: Open) -> None:
    """Forgets an object that has been closed."""
    _open.discard(one)


def close_quietly(one: Open) -> None:
    """Closes an object where nobody can catch an error: it becomes a warning."""
    try:
        one.close()
    except Exception as error:
        warn_safely(NOT_ENDED.format(error=described_error(error)))


def _close_all() -> None:
    for one in list(_open):
        if one not in _ended_by_owner:
            close_quietly(one)


def _disown_all() -> None:
    """Keeps a forked process from delivering records that its parent will deliver."""
    ours = list(_open)
    _open.clear()
    for one in ours:
        one.disown()


if hasattr(os, "register_at_fork"):  # Windows cannot fork
    os.register_at_fork(after_in_child=_disown_all)

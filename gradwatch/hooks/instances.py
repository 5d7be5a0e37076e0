"""The objects of a class that the process holds, where torch keeps no list of them."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")

_found: ContextVar[dict[frozenset[type], list[Any]] | None] = ContextVar("_found", default=None)


@contextmanager
def looked_for_once() -> Iterator[None]:
    """Has objects of the same classes looked for once only, for a block that makes none of them."""
    token = _found.set({})
    try:
        yield
    finally:
        _found.reset(token)


def instances_of(*classes: type[T], among: Iterable[Any] | None = None) -> list[T]:
    """Lists the objects of some classes and their subclasses.

    It looks at every object of the process, of which there may be a million. Objects that
    ``gc.freeze()`` has set aside are not found.

    Args:
        classes: The classes. Without one, no object is looked at.
        among: The objects that are looked at; None for all of the process.
    """
    kinds: set[type] = set(classes)
    waiting: list[type] = [*classes]
    while waiting:
        found: list[type] = type.__subclasses__(waiting.pop())
        new = [one for one in found if one not in kinds]
        kinds.update(new)
        waiting += new
    if not kinds:
        return []
    known, key = _found.get(), frozenset(kinds)
    if known is None or among is not None:
        return _of_kinds(kinds, gc.get_objects() if among is None else among)
    if key not in known:
        known[key] = _of_kinds(kinds, gc.get_objects())
    return [*known[key]]


def _of_kinds(kinds: set[type], among: Iterable[Any]) -> list[Any]:
    # Not isinstance(), which is slower, and which reads __class__: a proxy may raise an error.
    return [one for one in among if type(one) in kinds]

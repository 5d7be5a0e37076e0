"""The objects of a class that the process holds, where torch keeps no list of them."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any, TypeVar

T = TypeVar("T")


def instances_of(kind: type[T], among: Iterable[Any] | None = None) -> list[T]:
    """Lists the objects of a class and its subclasses.

    It looks at every object of the process, of which there are hundreds of thousands. Objects that
    ``gc.freeze()`` has set aside are not found.

    Args:
        kind: The class.
        among: The objects that are looked at; None for all of the process.
    """
    kinds: set[type] = {kind}
    waiting: list[type] = [kind]
    while waiting:
        found: list[type] = type.__subclasses__(waiting.pop())
        new = [one for one in found if one not in kinds]
        kinds.update(new)
        waiting += new
    # Not isinstance(), which is slower, and which reads __class__: a proxy may raise an error.
    return [one for one in (gc.get_objects() if among is None else among) if type(one) in kinds]

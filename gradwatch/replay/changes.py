"""Changes: what a forward changes in Python objects, of which nobody knows what they were before.

Nothing of them is copied in the training, so a replay gives the forward a cache that is filled
already, or a counter that is one too far. That shows when the replay has changed them once more.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from gradwatch.replay.arguments import attributes_of
from gradwatch.replay.reach import is_of_user

CHANGES = (
    "{name}, which the forward changes, was another one then: the replay was given what the "
    "training's forward has left of it."
)
MOST_ITEMS = 1_000
"""The largest container into which we look."""

_DEEPEST = 4
_MOST_BYTES = 2**16  # the largest array whose elements are compared
_PLAIN = (str, bytes, bool, int, float, complex, type(None))
_CONTAINERS = (dict, list, tuple, deque, set)
_OF_TORCH = frozenset({"_parameters", "_buffers", "_modules", "training"})

Path = tuple[object, ...]


class _Seen(NamedTuple):
    value: object
    token: tuple[object, ...]


class Changed(NamedTuple):
    """What a forward has changed.

    Attributes:
        names: The names of the objects.
        tensors: Tensors that were in what has changed, before that.
        spoiled: Whether a number among it was NaN or infinite before that.
    """

    names: list[str]
    tensors: list[Tensor]
    spoiled: bool


class Objects:
    """Some objects, as they are before a forward.

    Attributes:
        tensors: The tensors in them.
    """

    def __init__(
        self,
        arguments: Iterable[tuple[str, object]],
        modules: Iterable[tuple[str, nn.Module]],
        known: Collection[int] = (),
    ) -> None:
        """Looks at arguments and at the attributes of the user's modules, with their names.

        ``known`` are the ``id()`` of tensors of which it is said otherwise that they are written
        to.
        """
        self._arguments = list(arguments)
        self._modules = [
            (f"{name}." if name else "self.", one)
            for name, one in modules
            if is_of_user(type(one).__module__)
        ]
        self._known = known
        self._before = self._look()
        values = [seen.value for seen in self._before.values()]
        self.tensors = [one for one in values if isinstance(one, Tensor)]

    def changed(self) -> Changed:
        """Says what has changed."""
        before, now = self._before, self._look()
        paths = {path for path in before | now if before.get(path, _NO)[1] != now.get(path, _NO)[1]}
        tensors = {
            id(seen.value): seen.value
            for path, seen in before.items()
            if isinstance(seen.value, Tensor)
            and any(path[:length] in paths for length in range(1, len(path) + 1))
        }
        told = [path for path in before | now if path in paths and self._is_told(path, tensors)]
        numbers = (before[path].value for path in paths if path in before)
        return Changed(
            list(dict.fromkeys(map(self._name_of, told))),
            list(tensors.values()),
            any(isinstance(one, float) and not math.isfinite(one) for one in numbers),
        )

    def _name_of(self, path: Path) -> str:
        root = path[0]
        return self._arguments[root][0] if isinstance(root, int) else str(root)

    def _is_told(self, path: Path, tensors: Collection[int]) -> bool:
        if isinstance(path[0], int):
            return True
        seen = self._before.get(path)
        if seen is None or id(seen.value) in tensors:
            return seen is not None
        if isinstance(seen.value, _CONTAINERS):  # most often something is noted in it, and not read
            inside = (one.value for key, one in self._before.items() if key[: len(path)] == path)
            return any(id(one) in tensors for one in inside)
        holder = self._before.get(path[:-1])
        return holder is None or not isinstance(holder.value, _CONTAINERS)

    def _look(self) -> dict[Path, _Seen]:
        found: dict[Path, _Seen] = {}
        # By number: several forwards call their arguments alike.
        for number, (_, value) in enumerate(self._arguments):
            # An argument that is a tensor, and is written to, is told of as such.
            if not isinstance(value, Tensor):
                self._visit(value, (number,), found, everything=True)
        for prefix, module in self._modules:
            for key, value in vars(module).items():
                known = key in _OF_TORCH or key.endswith("_hooks") or isinstance(value, Tensor)
                if not known and not key.startswith("__"):
                    self._visit(value, (f"{prefix}{key}",), found, everything=False)
        return found

    def _visit(self, value: Any, path: Path, found: dict[Path, _Seen], everything: bool) -> None:
        found[path] = _Seen(value, _token(value, self._known))
        if len(path) <= _DEEPEST:
            for key, one in _items(value, everything):
                self._visit(one, (*path, key), found, everything)


_NO = _Seen(None, ())


def _token(value: Any, known: Collection[int]) -> tuple[object, ...]:
    """Returns what is the same for as long as a value is."""
    if isinstance(value, Tensor):
        counts = not value.is_inference() and id(value) not in known
        return id(value), value._version if counts else -1
    if isinstance(value, float):
        # Whether a NaN is the same one as before is only known if nobody has written it anew.
        return float, value if math.isfinite(value) else id(value)
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, np.ndarray):
        compared = value.nbytes <= _MOST_BYTES and not value.dtype.hasobject
        return id(value), value.tobytes() if compared else b""
    if isinstance(value, _CONTAINERS):
        return id(value), len(value)
    return (id(value),)


def _items(value: Any, everything: bool) -> Iterable[tuple[object, Any]]:
    if isinstance(value, _CONTAINERS):
        if len(value) > MOST_ITEMS or isinstance(value, set):
            return ()
        return list(value.items() if isinstance(value, dict) else enumerate(value))
    if isinstance(value, (*_PLAIN, Tensor, np.ndarray, nn.Module, type)) or callable(value):
        return ()
    if not everything and not is_of_user(type(value).__module__):
        return ()
    return [(key, getattr(value, key, None)) for key in attributes_of(value)]

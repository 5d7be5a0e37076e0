"""Changes: what a forward changes in Python objects, of which nobody knows what they were before.

Nothing of them is copied in the training, so a replay gives the forward a cache that is filled
already, or a counter that is one too far. That shows when the replay has changed them once more.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from torch import Tensor, nn

from gradwatch.hooks.draws import is_of_user
from gradwatch.replay.arguments import attributes_of

CHANGES = (
    "{name}, which the forward changes, was another one then: the replay was given what the "
    "training's forward has left of it."
)
TAKEN_BACK = (
    "{name}, which the forward changes, was taken to have been {value}: from there the forward "
    "brings it to what it is now."
)
MOST_ITEMS = 1_000
"""The largest container into which we look."""
MOST_LOOKED_AT = 20_000

_DEEPEST = 4
_MOST_BYTES = 2**16  # the largest array whose elements are compared
_PLAIN = (str, bytes, bool, int, float, complex, type(None))
_CONTAINERS = (dict, list, tuple, deque, set)
_OF_TORCH = frozenset({"_parameters", "_buffers", "_modules", "training"})

Path = tuple[object, ...]
"""What leads to a value: the number of an argument or the name of an attribute, then keys."""


class _Seen(NamedTuple):
    value: object
    token: tuple[object, ...]


class Changed(NamedTuple):
    """What a forward has changed.

    Attributes:
        names: The names of the objects.
        tensors: Tensors that were in what has changed, before that.
        spoiled: Whether a number among it was NaN or infinite before that.
        earlier: Numbers that may have been there before the forward of the training: as far away
            as the replay has moved those that it found.
        taken_back: Sentences about numbers that were put there, and that the forward has brought to
            what it had left in the training.
    """

    names: list[str]
    tensors: list[Tensor]
    spoiled: bool
    earlier: dict[Path, float]
    taken_back: list[str]


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
        earlier: Mapping[Path, float] | None = None,
    ) -> None:
        """Looks at the objects.

        Args:
            arguments: Arguments, with their names.
            modules: Modules, with their names; only attributes of the user's own are looked at.
            known: The ``id()`` of tensors of which it is said otherwise that they are written to.
            earlier: Numbers to put in place of those that are there.
        """
        self._arguments = list(arguments)
        self._modules = [
            (f"{name}." if name else "self.", one)
            for name, one in modules
            if is_of_user(type(one).__module__)
        ]
        self._known = known
        self._before = self._look()
        self._earlier = dict(earlier or {})
        for path, value in self._earlier.items():
            self._put(path, value)
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
        numbers = {path: before[path].value for path in paths if path in before}
        return Changed(
            list(dict.fromkeys(map(self._name_of, told))),
            list(tensors.values()),
            any(isinstance(one, float) and not math.isfinite(one) for one in numbers.values()),
            {
                path: 2 * old - new
                for path, old in numbers.items()
                if path in now
                and _is_number(old)
                and _is_number(new := now[path].value)
                and self._can_be_put(path)
            },
            [
                TAKEN_BACK.format(name=self._name_of(path, whole=True), value=value)
                for path, value in self._earlier.items()
            ],
        )

    def _can_be_put(self, path: Path) -> bool:
        """Returns whether a number can be written in place, and the replay puts it back."""
        holder, key = self._holder(path)
        if isinstance(holder, (dict, list, deque)):
            return True
        return is_of_user(type(holder).__module__) and key in getattr(holder, "__dict__", ())

    def _put(self, path: Path, value: float) -> None:
        holder, key = self._holder(path)
        if isinstance(holder, _CONTAINERS):
            holder[key] = value  # type: ignore[index]
        else:
            object.__setattr__(holder, str(key), value)

    def _holder(self, path: Path) -> tuple[object, object]:
        if len(path) > 1:
            return self._before[path[:-1]].value, path[-1]
        return next(
            (one, key)
            for prefix, one in self._modules
            for key in vars(one)
            if f"{prefix}{key}" == path[0]
        )

    def _name_of(self, path: Path, whole: bool = False) -> str:
        root, holder = path[0], path[:1]
        name = self._arguments[root][0] if isinstance(root, int) else str(root)
        for key in path[1:] if whole else ():
            name += (
                f"[{key!r}]" if isinstance(self._before[holder].value, _CONTAINERS) else f".{key}"
            )
            holder = (*holder, key)
        return name

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
        if len(found) >= MOST_LOOKED_AT:
            return
        try:
            found[path] = _Seen(value, _token(value, self._known))
            inside = list(_items(value, everything)) if len(path) <= _DEEPEST else []
        except Exception:  # a container of a class of the user's own: the replay does without
            return
        for key, one in inside:
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


def _is_number(value: object) -> TypeGuard[float]:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _items(value: Any, everything: bool) -> Iterable[tuple[object, Any]]:
    if isinstance(value, _CONTAINERS):
        if len(value) > MOST_ITEMS or isinstance(value, set):
            return ()
        return value.items() if isinstance(value, dict) else enumerate(value)
    if isinstance(value, (*_PLAIN, Tensor, np.ndarray, nn.Module, type)) or callable(value):
        return ()
    if not everything and not is_of_user(type(value).__module__):
        return ()
    return [(key, getattr(value, key, None)) for key in attributes_of(value)]

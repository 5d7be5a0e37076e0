"""Copies of what a forward was given, and the names of the tensors in it."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradwatch.hooks.draws import is_of_user
from gradwatch.replay.reach import positional
from gradwatch.replay.stand_ins import StandIns, rebuilt

_DEEPEST = 4
_PLAIN = (bool, int, float, complex, str, bytes, type, type(None))
# A generator of random numbers may be that of the model, too: what one draws the other does not.
_NEVER = (
    *(nn.Module, bytearray, torch.Generator, random.Random),
    *(np.random.Generator, np.random.RandomState, np.random.BitGenerator),
)


class Arguments:
    """Arguments whose tensors are copies; objects that cannot be copied are passed on as they are.

    Attributes:
        args: The positional ones.
        kwargs: Those by keyword.
        named: Both, with what the forward calls them.
        names: For each tensor in them, by ``id()`` of the original, what the forward calls it.
        passed_on: What is no copy, and may be written to: functions, modules, random generators.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        stand_ins: StandIns | None,
    ) -> None:
        """Copies them; without ``stand_ins`` no tensor or array, to see what is passed on."""
        self.names: dict[int, str] = {}
        self.passed_on: list[object] = []
        self._stand_ins = stand_ins
        self._copies: dict[int, Any] = {}
        names = positional(forward, args)
        self.args = tuple(self._copy(one, name, 0) for one, name in zip(args, names, strict=True))
        self.kwargs = {name: self._copy(one, name, 0) for name, one in kwargs.items()}
        self.named = [*zip(names, self.args, strict=True), *self.kwargs.items()]

    def _copy(self, value: Any, name: str, depth: int) -> Any:
        if isinstance(value, Tensor):
            self.names.setdefault(id(value), name)
            return value if self._stand_ins is None else self._stand_ins.of(value)
        if isinstance(value, _PLAIN):
            return value
        if depth > _DEEPEST or isinstance(value, _NEVER) or callable(value):
            return self._pass_on(value)
        if id(value) not in self._copies:
            copied = self._copy_container(value, name, depth + 1)
            if copied is value and not isinstance(value, tuple):
                copied = self._pass_on(value)
            self._copies[id(value)] = copied
        return self._copies[id(value)]

    def _pass_on(self, value: Any) -> Any:
        self.passed_on.append(value)
        return value if self._stand_ins is None else self._stand_ins.swapped(value)

    def _copy_container(self, value: Any, name: str, depth: int) -> Any:
        if isinstance(value, tuple):
            keys = getattr(value, "_fields", range(len(value)))
            items = [
                self._copy(one, _at(name, key, isinstance(key, str)), depth)
                for key, one in zip(keys, value, strict=True)
            ]
            return value if all(map(is_, items, value)) else rebuilt(value, items)
        if type(value) is list:
            return [self._copy(one, _at(name, i), depth) for i, one in enumerate(value)]
        if type(value) is dict:
            return {key: self._copy(one, _at(name, key), depth) for key, one in value.items()}
        if isinstance(value, np.ndarray):
            return value if self._stand_ins is None else value.copy()
        return self._copy_object(value, name, depth)

    def _copy_object(self, value: Any, name: str, depth: int) -> Any:
        """Copies an object with what it holds, such as a batch of a class of one's own."""
        try:
            if isinstance(value, dict):
                other = copy.copy(value)
                for key, one in value.items():
                    other[key] = self._copy(one, _at(name, key), depth)
                return other
            keys = attributes_of(value)
            items = [self._copy(getattr(value, key), _at(name, key, True), depth) for key in keys]
            same = all(one is getattr(value, key) for key, one in zip(keys, items, strict=True))
            # The forward may count in an object of the user's, such as a cache.
            if same and not (items and is_of_user(type(value).__module__)):
                return value
            other = copy.copy(value)
            if other is value:  # it does not want to be copied, as a member of an Enum
                return value
            for key, one in zip(keys, items, strict=True):
                object.__setattr__(other, key, one)  # the class may be frozen
        except Exception:
            return value
        return other


def attributes_of(value: Any) -> list[str]:
    """Lists the attributes that an object has of its own."""
    if is_dataclass(value):
        return [one.name for one in fields(value)]
    slots = [key for kind in type(value).__mro__ for key in vars(kind).get("__slots__", ())]
    return [*getattr(value, "__dict__", ()), *(key for key in slots if hasattr(value, key))]


def _at(name: str, key: object, is_attribute: bool = False) -> str:
    return f"{name}.{key}" if is_attribute else f"{name}[{key!r}]"

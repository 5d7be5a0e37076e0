"""Reach: what running a model again may write to, found from its modules, hooks and functions.

A forward may count its calls in an attribute, append to a list, keep a hidden state or draw from a
generator of its own; a hook may write to a list in its closure or to a global. All of these are
*places*: containers whose contents are noted, and put back in place afterwards, so that the very
same objects are there again. Tensors that are found in them are replaced for the time between.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import random
import sys
import threading
from argparse import Namespace
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from enum import Enum
from functools import partial
from itertools import chain, count, repeat
from operator import is_
from types import (
    BuiltinMethodType,
    CellType,
    CodeType,
    FunctionType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.optim import Optimizer

from gradwatch.hooks.draws import Drawn, drawn_by, is_of_user
from gradwatch.hooks.generators import torch_generators
from gradwatch.replay.stand_ins import rebuilt

MOST_ITEMS = 10_000
"""The largest container into which we look; the contents of a larger one are still noted."""

MOST_BYTES = 2**28
"""The largest array that is copied; the data of a training may be far larger."""

_DEEPEST = 4  # containers in containers, and functions called by functions
_IN_MEMORY: tuple[Any, ...] = (io.StringIO, io.BytesIO)
_PLAIN = (str, bytes, bool, int, float, complex, type(None), torch.dtype, torch.device, torch.Size)
_OURS = "gradwatch"


class _Place(Protocol):
    """Something that holds values by key, and can get those back that it had."""

    def items(self) -> Iterable[tuple[Any, Any]]: ...

    def set(self, key: Any, value: Any) -> None: ...

    def restore(self) -> None: ...


class Reach:
    """What is in reach of some modules and functions.

    Attributes:
        modules: All modules, each once.
        tensors: All tensors that a place holds, each once, with what a user calls it; the name of
            one that is in a module is empty.
        optimizers: The optimizers; what they hold is not looked at.
        compiled: Whether some of it is compiled.
        draws: Whether there are random generators that are not the global ones.
    """

    def __init__(self, roots: Iterable[object]) -> None:
        """Looks at the modules and functions, and at the forward hooks on all modules."""
        self.modules: list[nn.Module] = []
        self.tensors: dict[int, tuple[Tensor, str]] = {}
        self.optimizers: list[Optimizer] = []
        self.compiled = False
        self.draws = False
        self._places: list[_Place] = []
        self._restores: list[Callable[[], object]] = []
        self._copies: dict[int, Any] = {}
        self._put_back: set[int] = set()
        self._swaps: Mapping[int, Any] = {}
        self._seen: dict[int, object] = {}  # ids are only good while the objects are there
        self._waiting: deque[tuple[object, int, str]] = deque((root, 0, "") for root in roots)
        self._waiting.extend((hooks, 0, "") for hooks in _global_hooks())
        while self._waiting:
            self._visit(*self._waiting.popleft())

    def replace(self, stand_ins: Mapping[int, Tensor]) -> None:
        """Writes other tensors in place of those found, by ``id()``; those not listed stay."""
        # Arrays and iterators as well: a forward may write to one, or take from it.
        swaps = self._swaps = {**self._copies, **stand_ins}
        for place in self._places:
            for key, value in place.items():
                other = _swapped(value, swaps)
                if other is not value:
                    place.set(key, other)

    def swapped(self, value: Any) -> Any:
        """Returns a value as :meth:`replace` has written it: a ``partial`` is no place."""
        return _swapped(value, self._swaps)

    def restore(self) -> None:
        """Puts back what each place held, and the states of generators."""
        # It calls all of them, also after one has failed: a class may be the user's own.
        with contextlib.ExitStack() as stack:
            for place in self._places:
                stack.callback(place.restore)
            for restore in self._restores:
                stack.callback(restore)

    def drawn(
        self, functions: Iterable[Callable[..., Any]], given: Iterable[object] = ()
    ) -> Iterator[tuple[Drawn, bool]]:
        """Yields what running again takes items from, each with whether it is put back.

        Args:
            functions: Other functions that are run; forwards and hooks of modules are known.
            given: What else they are given.
        """
        code = [*functions]
        for module in self.modules:
            code += [module.forward, *_hooks(module)]
        code = [partial(id, *given), *filter(_is_written_by_user, code)]
        for one in chain.from_iterable(map(drawn_by, code)):
            seen = id(one.value) in self._seen and is_of_user(type(one.value).__module__)
            known = id(one.value) in self._copies or id(one.value) in self._put_back
            yield one, known or seen

    # -- one object after the other ----------------------------------------------------------------

    def _visit(self, value: Any, depth: int, name: str) -> None:
        if name and id(value) in self.tensors and not self.tensors[id(value)][1]:
            self.tensors[id(value)] = (value, name)
        if isinstance(value, _PLAIN) or depth > _DEEPEST or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        kind = type(value)
        if kind.__module__.partition(".")[0] == _OURS and not isinstance(value, nn.Module):
            return
        for kinds, visit in self._visits():
            if isinstance(value, kinds):
                visit(value, depth, name)
                return
        if kind.__module__ in ("builtins", "itertools") and hasattr(kind, "__next__"):
            self._visit_iterator(value, depth)
        elif is_of_user(kind.__module__) or (depth <= 1 and callable(value)):
            self._visit_object(value, depth, name)
        elif _is_data(value):
            self._visit_object(value, depth - 1, name)  # all of it, as it does not lead anywhere

    def _visits(self) -> Iterator[tuple[Any, Callable[[Any, int, str], None]]]:
        yield Tensor, self._visit_tensor
        yield nn.Module, self._visit_module
        yield dict, self._visit_dict
        yield (list, deque), self._visit_list
        yield set, self._visit_set
        yield tuple, self._visit_tuple
        yield FunctionType, self._visit_function
        yield (MethodType, BuiltinMethodType), self._visit_method
        yield partial, self._visit_partial
        yield (staticmethod, classmethod, property), self._visit_descriptor
        yield np.ndarray, self._visit_array
        yield (array, bytearray), self._visit_bytes
        yield (SimpleNamespace, Namespace, threading.local), self._visit_object
        yield io.IOBase, self._visit_file
        yield ContextVar, self._visit_context
        yield np.random.SeedSequence, self._visit_seeds
        yield torch.Generator, self._visit_generator
        yield (
            (np.random.Generator, np.random.RandomState, np.random.BitGenerator),
            self._visit_numpy,
        )
        yield random.Random, self._visit_random
        pandas: Any = sys.modules.get("pandas")
        if pandas is not None:
            yield (pandas.DataFrame, pandas.Series), self._visit_frame
        yield Optimizer, lambda value, depth, name: self.optimizers.append(value)
        yield type, self._visit_class
        yield ModuleType, lambda value, depth, name: None

    def _later(self, values: Iterable[Any], depth: int, names: Iterable[str] = repeat("")) -> None:
        self._waiting.extend(
            (value, depth, name) for value, name in zip(values, names, strict=False)
        )

    def _visit_tensor(self, tensor: Tensor, depth: int, name: str) -> None:
        self.tensors[id(tensor)] = (tensor, name)

    def _visit_module(self, module: nn.Module, depth: int, name: str) -> None:
        self.modules.append(module)
        self.compiled |= module._compiled_call_impl is not None or "dynamo_ctx" in vars(module)
        inside = vars(module)
        self._places.append(_Dict(inside))
        # Hooks, and modules deep in others, are looked at as closely as those that we began with.
        self._later(_hooks(module), 0)
        self._later((inside.get("_modules") or {}).values(), 0)
        self._later(inside.values(), 1)
        self._visit_classes(type(module), 1)

    def _visit_object(self, value: Any, depth: int, name: str) -> None:
        inside = getattr(value, "__dict__", None)
        if type(inside) is dict:
            self._places.append(_Dict(inside))
            names = (name and f"{name}.{key}" for key in inside)
            self._later(inside.values(), depth + 1, names)
        slots = _Slots(value)
        if slots.has_any:
            self._places.append(slots)
            for slot, one in slots.items():
                self._waiting.append((one, depth + 1, name and f"{name}.{slot.__name__}"))
        self._visit_classes(type(value), depth + 1)

    def _visit_classes(self, kind: type, depth: int) -> None:
        self._later((one for one in kind.__mro__ if is_of_user(one.__module__)), depth)

    def _visit_class(self, kind: type, depth: int, name: str) -> None:
        if is_of_user(kind.__module__):
            self._places.append(_Class(kind))
            self._later(vars(kind).values(), depth + 1)

    def _visit_dict(self, value: dict[Any, Any], depth: int, name: str) -> None:
        place = _Dict(value)
        self._places.append(place)
        if len(value) <= MOST_ITEMS:
            names = (name and f"{name}[{key!r}]" for key, _ in place.items())
            self._later((one for _, one in place.items()), depth + 1, names)

    def _visit_list(self, value: list[Any] | deque[Any], depth: int, name: str) -> None:
        self._places.append(_List(value))
        if len(value) <= MOST_ITEMS:
            self._later(value, depth + 1, _numbered(name))

    def _visit_set(self, value: set[Any], depth: int, name: str) -> None:
        self._places.append(_Set(value))

    def _visit_tuple(self, value: tuple[Any, ...], depth: int, name: str) -> None:
        if len(value) <= MOST_ITEMS:
            self._later(value, depth + 1, _numbered(name))

    def _visit_array(self, value: Any, depth: int, name: str) -> None:
        if not value.dtype.hasobject and value.nbytes <= MOST_BYTES:
            self._copies[id(value)] = value.copy()

    def _visit_bytes(self, value: array[Any] | bytearray, depth: int, name: str) -> None:
        if len(value) * getattr(value, "itemsize", 1) <= MOST_BYTES:
            self._copies[id(value)] = copy.copy(value)

    def _visit_frame(self, value: Any, depth: int, name: str) -> None:
        if np.sum(value.memory_usage()) <= MOST_BYTES:
            self._copies[id(value)] = value.copy()

    def _visit_iterator(self, value: Any, depth: int) -> None:
        known = dict(self._copies)
        try:
            _copied_iterator(value, known)
        except TypeError:  # a generator; from Python 3.14 on those of itertools as well
            return
        self._copies = known
        reduced = value.__reduce_ex__(4)
        parts = (*reduced[1], *(one for one in reduced[2:3] if isinstance(one, tuple)))
        self._later(parts, depth)

    def _visit_file(self, file: Any, depth: int, name: str) -> None:
        with contextlib.suppress(ValueError, OSError):  # closed, or a pipe
            if isinstance(file, _IN_MEMORY):
                self._restores.append(partial(file.__setstate__, file.__getstate__()))
            elif not file.readable() or file.writable() or not file.seekable():
                return
            else:
                self._restores.append(partial(file.seek, file.tell()))
            self._put_back.add(id(file))

    def _visit_context(self, variable: ContextVar[Any], depth: int, name: str) -> None:
        with contextlib.suppress(LookupError):  # it has no value
            value = variable.get()
            self._restores.append(partial(variable.reset, variable.set(value)))
            self._later([value], depth + 1)

    def _visit_seeds(self, value: np.random.SeedSequence, depth: int, name: str) -> None:
        self._copies[id(value)] = type(value)(**value.state)

    # -- functions ---------------------------------------------------------------------------------

    def _visit_function(self, function: Any, depth: int, name: str) -> None:
        module = str(function.__module__)
        if module.partition(".")[0] == _OURS:
            return
        self.compiled |= _is_compiled(function)
        for variable, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            with contextlib.suppress(ValueError):  # an empty cell
                self._waiting.append((cell.cell_contents, depth + 1, variable))
                self._places.append(_Cell(cell))
        self._later((function.__kwdefaults__ or {}).values(), depth + 1)
        if function.__defaults__:
            self._places.append(_Defaults(function))
            self._later(function.__defaults__, depth + 1)
        if function.__dict__:
            self._places.append(_Dict(function.__dict__))
            self._later(function.__dict__.values(), depth + 1)
        if is_of_user(module):
            self._visit_globals(function.__globals__, set(_names(function.__code__)), depth)

    def _visit_globals(self, inside: dict[str, Any], names: set[str], depth: int) -> None:
        place = _Names(inside, names)
        self._places.append(place)
        for variable, value in place.items():
            if isinstance(value, ModuleType):
                if is_of_user(value.__name__) and depth < _DEEPEST:
                    self._visit_globals(vars(value), names, depth + 1)
            else:
                self._waiting.append((value, depth + 1, variable))

    def _visit_method(self, method: Any, depth: int, name: str) -> None:
        owner = getattr(method, "__self__", None)
        if isinstance(owner, ModuleType) or owner is None:
            return
        known = isinstance(owner, (nn.Module, Tensor, dict, list, deque, set))
        is_ours = type(owner).__module__.partition(".")[0] == _OURS
        if known or isinstance(owner, type):
            self._later([owner], depth)
        elif not is_ours and id(owner) not in self._seen and depth <= _DEEPEST:
            self._seen[id(owner)] = owner
            self._visit_object(owner, depth, "self")
        if isinstance(method, MethodType) and not is_ours:
            self._later([method.__func__], depth)

    def _visit_partial(self, value: partial[Any], depth: int, name: str) -> None:
        # First what it is called with: that is the batch.
        named = zip(positional(value.func, value.args), value.args, strict=True)
        self._waiting.extend((one, depth, name) for name, one in named)
        self._waiting.extend((one, depth, name) for name, one in value.keywords.items())
        self._later([value.func], depth)

    def _visit_descriptor(self, value: Any, depth: int, name: str) -> None:
        parts = ("__func__", "fget", "fset")
        self._later([getattr(value, part, None) for part in parts], depth)

    # -- generators --------------------------------------------------------------------------------

    def _visit_generator(self, generator: torch.Generator, depth: int, name: str) -> None:
        if any(generator is one for one in torch_generators()):
            return  # a global one, which is put back by itself
        self.draws = True
        self._restores.append(partial(generator.set_state, generator.get_state()))

    def _visit_numpy(self, generator: Any, depth: int, name: str) -> None:
        if any(generator is one for one in (_NUMPY, _NUMPY._bit_generator)):
            return
        self.draws = True
        if isinstance(generator, np.random.RandomState):
            state = generator.get_state(legacy=False)
            self._restores.append(partial(generator.set_state, state))
            return
        bits = getattr(generator, "bit_generator", generator)
        self._restores.append(partial(setattr, bits, "state", bits.state))

    def _visit_random(self, generator: random.Random, depth: int, name: str) -> None:
        if generator is _PYTHON or isinstance(generator, random.SystemRandom):
            return
        self.draws = True
        self._restores.append(partial(generator.setstate, generator.getstate()))


_PYTHON = getattr(random.getstate, "__self__", None)
_NUMPY: Any = getattr(np.random.get_state, "__self__", None)


def _global_hooks() -> Iterator[dict[int, Any]]:
    """Yields the dicts of the hooks that torch calls for every module."""
    for name, value in vars(module_hooks).items():
        if name.startswith("_global_") and isinstance(value, dict):
            yield value


def _hooks(module: nn.Module) -> Iterator[Any]:
    """Yields the hooks on a module."""
    for key, value in vars(module).items():
        if key.endswith("_hooks") and isinstance(value, dict):
            yield from value.values()


def _is_written_by_user(function: Any) -> bool:
    while isinstance(function, partial):
        function = function.func
    function = getattr(function, "__func__", function)
    written = function if isinstance(function, FunctionType) else type(function)
    return is_of_user(str(written.__module__))


def _copied_iterator(value: Any, known: dict[int, Any]) -> Any:
    """Copies an iterator with those that it takes from, but with nothing else.

    Args:
        value: The iterator.
        known: Copies by ``id()``; it adds those that it makes.

    Raises:
        TypeError: If one of them cannot be copied.
    """
    if id(value) in known:
        return known[id(value)]
    if type(value).__module__ not in ("builtins", "itertools"):
        raise TypeError
    if hasattr(value, "__copy__"):  # what itertools.tee() returns
        known[id(value)] = copy.copy(value)
        return known[id(value)]
    make, args, *state = value.__reduce_ex__(4)

    def copied(part: Any) -> Any:
        if type(part) is tuple:
            parts = tuple(map(copied, part))
            return part if all(map(is_, parts, part)) else parts
        return _copied_iterator(part, known) if isinstance(part, Iterator) else part

    other = known[id(value)] = make(*map(copied, args))
    if state and state[0] is not None:
        parts = state[0]
        if isinstance(parts, tuple):
            # A list is what itertools.cycle() has seen so far, and adds to.
            parts = tuple(list(one) if type(one) is list else copied(one) for one in parts)
        other.__setstate__(parts)
    return other


_DATA = (*_PLAIN, Tensor, np.ndarray, np.generic, Enum, type)
_DEEPEST_DATA = 5


def _is_data(value: object, depth: int = 0) -> bool:
    """Returns whether an object of an installed package holds nothing but data.

    These are caches of keys and values, configurations and the like. What leads to a model, a
    thread or a file is part of a machinery that has its own ideas of what it holds.
    """
    if isinstance(value, _DATA):
        return True
    if depth > _DEEPEST_DATA:
        return False
    if isinstance(value, dict):
        inside: Iterable[object] = [*value.keys(), *value.values()]
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        inside = value
    else:
        root = type(value).__module__.partition(".")[0]
        attributes = getattr(value, "__dict__", None)
        if root in sys.stdlib_module_names or root in ("torch", _OURS) or not attributes:
            return False
        inside = attributes.values()
    items = list(inside)
    return len(items) <= MOST_ITEMS and all(_is_data(one, depth + 1) for one in items)


def _numbered(name: str) -> Iterator[str]:
    return (name and f"{name}[{number}]" for number in count())


def positional(forward: Callable[..., Any], args: tuple[Any, ...]) -> list[str]:
    """Returns what a function calls its positional arguments."""
    names: list[str] = []
    try:
        parameters = list(inspect.signature(forward).parameters.values())
    except (TypeError, ValueError):  # written in C, without a signature
        parameters = []
    for one in parameters:
        if one.kind is one.VAR_POSITIONAL:
            rest = len(args) - len(names)
            names.extend(f"{one.name}[{i}]" for i in range(rest))
        elif one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD):
            names.append(one.name)
    names.extend(f"args[{i}]" for i in range(len(names), len(args)))
    return names[: len(args)]


def uncompiled(function: Any) -> Any:
    """Returns what ``torch.compile()`` was given, if a function is what that returned."""
    return function._torchdynamo_orig_callable if _is_compiled(function) else function


def _is_compiled(function: object) -> bool:
    # torch marks those alike that it is told not to compile.
    return hasattr(function, "_torchdynamo_orig_callable") and not hasattr(
        function, "_torchdynamo_disable"
    )


def _names(code: CodeType) -> Iterator[str]:
    """Yields the global names that a function and the functions in it use, and attributes too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _swapped(value: Any, swaps: Mapping[int, Any]) -> Any:
    """Returns what stands in for a value, or the value itself."""
    if id(value) in swaps:
        return swaps[id(value)]
    if isinstance(value, tuple) and len(value) <= MOST_ITEMS:
        items = [_swapped(one, swaps) for one in value]
        return value if all(map(is_, items, value)) else rebuilt(value, items)
    if isinstance(value, FunctionType):
        return uncompiled(value)
    if isinstance(value, partial):
        parts = (value.func, value.args, tuple(value.keywords.values()))
        func, args, values = (_swapped(one, swaps) for one in parts)
        if all(map(is_, (func, args), parts)) and values is parts[2]:
            return value
        return partial(func, *args, **dict(zip(value.keywords, values, strict=True)))
    return value


# -- places ----------------------------------------------------------------------------------------


class _Dict:
    """A dict, or the attributes of an object."""

    def __init__(self, target: dict[Any, Any]) -> None:
        # A derived class may do something else when it is written to.
        self._base: Any = OrderedDict if isinstance(target, OrderedDict) else dict
        self._target = target
        self._saved = dict(self._base.items(target))

    def items(self) -> Iterable[tuple[Any, Any]]:
        return self._saved.items()

    def set(self, key: Any, value: Any) -> None:
        self._base.__setitem__(self._target, key, value)

    def restore(self) -> None:
        target, saved, base = self._target, self._saved, self._base
        for key in [key for key in base.keys(target) if key not in saved]:
            base.__delitem__(target, key)
        if len(target) != len(saved) or not all(map(is_, base.keys(target), saved)):
            base.clear(target)
        # Where the keys are the same, somebody may be going through it: it keeps its size.
        for key, value in saved.items():
            if dict.get(target, key, self) is not value:
                base.__setitem__(target, key, value)


class _Slots:
    """The attributes of an object for which its class has slots."""

    def __init__(self, target: object) -> None:
        self._target = target
        self._saved: list[tuple[Any, Any]] = []
        self._empty: list[Any] = []
        for kind in type(target).__mro__:
            if "__slots__" not in vars(kind):
                continue
            for slot in vars(kind).values():
                if not isinstance(slot, MemberDescriptorType):
                    continue
                try:
                    self._saved.append((slot, slot.__get__(target)))
                except AttributeError:
                    self._empty.append(slot)

    @property
    def has_any(self) -> bool:
        return bool(self._saved or self._empty)

    def items(self) -> Iterable[tuple[Any, Any]]:
        return self._saved

    def set(self, key: Any, value: Any) -> None:
        key.__set__(self._target, value)  # the class may be frozen

    def restore(self) -> None:
        for slot, value in self._saved:
            slot.__set__(self._target, value)
        for slot in self._empty:
            with contextlib.suppress(AttributeError):
                slot.__delete__(self._target)


class _List:
    """A list or a deque."""

    def __init__(self, target: list[Any] | deque[Any]) -> None:
        self._target = target
        self._saved = list(target)

    def items(self) -> Iterable[tuple[Any, Any]]:
        return enumerate(self._saved if len(self._saved) <= MOST_ITEMS else ())

    def set(self, key: Any, value: Any) -> None:
        self._target[key] = value

    def restore(self) -> None:
        target, saved = self._target, self._saved
        if len(target) == len(saved) and all(map(is_, target, saved)):
            return
        base: Any = deque if isinstance(target, deque) else list
        base.clear(target)
        base.extend(target, saved)


class _Set:
    """A set."""

    def __init__(self, target: set[Any]) -> None:
        self._target = target
        self._saved = set(target)

    def items(self) -> Iterable[tuple[Any, Any]]:
        return ()

    def set(self, key: Any, value: Any) -> None:
        """Has no keys."""

    def restore(self) -> None:
        if self._target != self._saved:
            set.clear(self._target)
            set.update(self._target, self._saved)


class _Cell:
    """A variable that a function shares with the one around it."""

    def __init__(self, cell: CellType) -> None:
        self._cell = cell
        self._saved = cell.cell_contents

    def items(self) -> Iterable[tuple[Any, Any]]:
        return ((None, self._saved),)

    def set(self, key: Any, value: Any) -> None:
        self._cell.cell_contents = value

    def restore(self) -> None:
        self._cell.cell_contents = self._saved


class _Defaults:
    """The defaults of a function's parameters."""

    def __init__(self, function: Any) -> None:
        self._function = function
        self._saved = function.__defaults__

    def items(self) -> Iterable[tuple[Any, Any]]:
        return ((None, self._saved),)

    def set(self, key: Any, value: Any) -> None:
        self._function.__defaults__ = value

    def restore(self) -> None:
        if self._function.__defaults__ is not self._saved:
            self._function.__defaults__ = self._saved


class _Names:
    """Some global variables of a Python module."""

    def __init__(self, target: dict[str, Any], names: Iterable[str]) -> None:
        self._target = target
        self._names = [name for name in names if not name.startswith("__")]
        self._saved = {name: target[name] for name in self._names if name in target}

    def items(self) -> Iterable[tuple[Any, Any]]:
        return self._saved.items()

    def set(self, key: Any, value: Any) -> None:
        self._target[key] = value

    def restore(self) -> None:
        for name in self._names:
            if name not in self._saved:
                self._target.pop(name, None)
            elif self._target.get(name, self) is not self._saved[name]:
                self._target[name] = self._saved[name]


class _Class:
    """The attributes of a class."""

    def __init__(self, target: type) -> None:
        self._target = target
        self._saved = self._now()

    def items(self) -> Iterable[tuple[Any, Any]]:
        return self._saved.items()

    def set(self, key: Any, value: Any) -> None:
        type.__setattr__(self._target, key, value)

    def restore(self) -> None:
        now = self._now()
        for name in now.keys() - self._saved.keys():
            type.__delattr__(self._target, name)
        for name, value in self._saved.items():
            if now.get(name, self) is not value:
                type.__setattr__(self._target, name, value)

    def _now(self) -> dict[str, Any]:
        # What Python itself keeps there is not for writing.
        return {
            name: value
            for name, value in vars(self._target).items()
            if not (name.startswith("__") and name.endswith("__")) and name != "_abc_impl"
        }

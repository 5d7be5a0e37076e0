"""What code draws from: iterators and the like that it leads to, whose next item it may take.

Looked for by name: of an object these are the attributes that the code names, and what the methods
that it names use in turn. So an iterator that an object happens to hold does no harm.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from dis import get_instructions
from functools import lru_cache, partial
from queue import Queue, SimpleQueue
from types import (
    CellType,
    CodeType,
    FunctionType,
    GeneratorType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any, NamedTuple

from torch import Tensor

_DEEPEST = 6  # functions and methods that are called by functions, attributes of objects
_MOST_ITEMS = 64  # of a container that is looked into
_LIBRARIES = ("site-packages", "dist-packages")

Names = tuple[str, ...]

Variables = tuple[tuple[CellType, ...], dict[str, Any]]
"""What a function reads from outside: copies of its cells, and the globals that it names."""


class Drawn(NamedTuple):
    """An iterator, a file that is read, or a queue that items are taken from.

    Attributes:
        value: The object.
        path: What the code calls it, such as ``self.batches``; empty if it has no name.
    """

    value: Any
    path: str

    def __str__(self) -> str:
        kind = type(self.value).__name__
        if isinstance(self.value, io.IOBase):
            kind = "file"
        return f"{self.path} ({kind})" if self.path else f"an object of type {kind}"


def drawn_by(function: Callable[..., Any]) -> Iterator[Drawn]:
    """Yields what a function, or what it calls, may take items from."""
    return _drawn(function, (), "", 0, set())


def _drawn(
    value: Any, names: Names, path: str, depth: int, seen: set[tuple[int, Names]]
) -> Iterator[Drawn]:
    if _is_drawn(value, names):
        yield Drawn(value, path)
    key = id(value), names
    if depth > _DEEPEST or key in seen or isinstance(value, Tensor | type | str | bytes):
        return
    if not isinstance(value, MethodType):  # which is made anew each time, and so has no id
        seen.add(key)
    for one, using, where in _leads_to(value, names, path):
        yield from _drawn(one, using, where, depth + 1, seen)


def _is_drawn(value: Any, names: Names) -> bool:
    if isinstance(value, (Queue, SimpleQueue)):
        return not {"get", "get_nowait"}.isdisjoint(names)
    if isinstance(value, io.IOBase):  # files are iterators, too, and most are written to
        with contextlib.suppress(ValueError):  # closed
            return value.readable() and not value.writable()
        return False
    if isinstance(value, GeneratorType) and value.gi_frame is None:  # it has ended
        return False
    return isinstance(value, Iterator)


def _leads_to(value: Any, names: Names, path: str) -> Iterator[tuple[Any, Names, str]]:
    """Yields what a value leads to, each with the names of the code that may use it."""
    if isinstance(value, partial):
        for one in (value.func, *value.args, *value.keywords.values()):
            yield one, names, ""
    elif isinstance(value, MethodType):
        yield value.__func__, names, ""
        yield value.__self__, names_in(value.__func__), path or "self"
    elif isinstance(value, FunctionType):
        own = names_in(value)
        for name, one in _outside(value):
            yield one, own, name
    elif isinstance(value, (list, tuple, dict)):
        if len(value) <= _MOST_ITEMS:
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, one in items:
                yield one, names, path and f"{path}[{key!r}]"
    else:
        yield from _attributes(value, names, path)


def _outside(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yields what the code of a function uses from outside, by name, and its defaults."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # an empty cell
            yield name, cell.cell_contents
    # An attribute of the same name as a global variable is another thing.
    for name in _globals_of(function.__code__):
        value = function.__globals__.get(name)
        if not _is_fixed(value):
            yield name, value
    for value in function.__defaults__ or ():
        yield "", value


@lru_cache
def _globals_of(code: CodeType) -> Names:
    names = [i.argval for i in get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names += _globals_of(constant)
    return tuple(dict.fromkeys(names))


def _attributes(value: Any, names: Names, path: str) -> Iterator[tuple[Any, Names, str]]:
    kind = type(value)
    if isinstance(value, Iterator):
        names = (*names, "__next__")
    inside = getattr(value, "__dict__", {})
    for name in names:
        where = path and f"{path}.{name}"
        if name in inside:
            yield inside[name], names, where
            continue
        found = getattr(kind, name, None)
        if isinstance(found, property):
            found = found.fget
        if isinstance(found, MemberDescriptorType) and hasattr(value, name):  # a slot
            yield getattr(value, name), names, where
        elif isinstance(found, FunctionType) and not _is_of_base(found.__module__):
            yield MethodType(found, value), names, path


def variables_of(function: object) -> Variables:
    """Returns what a function reads from outside, as it is now."""
    if not isinstance(function, FunctionType):
        return (), {}
    cells = tuple(map(_copied, function.__closure__ or ()))
    inside = function.__globals__
    names = [name for name in _names(function.__code__) if name in inside]
    return cells, {name: inside[name] for name in names if not _is_fixed(inside[name])}


def names_in(function: Any) -> Names:
    """Returns the global names and the attributes that the code of a function names."""
    code = getattr(function, "__code__", None)
    return () if code is None else tuple(dict.fromkeys(_names(code)))


def _copied(cell: CellType) -> CellType:
    try:
        return CellType(cell.cell_contents)
    except ValueError:  # a variable that has no value yet
        return CellType()


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_fixed(value: object) -> bool:
    return isinstance(value, type | ModuleType)


def _is_of_base(module: str) -> bool:
    root = str(module).partition(".")[0]
    return root in sys.stdlib_module_names or root in ("torch", "gradwatch")


def is_of_user(module: str) -> bool:
    """Returns whether a Python module is the user's: neither a library's, nor ours."""
    if _is_of_base(module):
        return False
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return not any(folder in file for folder in _LIBRARIES)

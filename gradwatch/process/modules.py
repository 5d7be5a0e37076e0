"""The modules of a process: noted while they are built, or searched for among all objects.

The search looks at every object of the process, half a million once a large library is imported.
What was noted tells most models without it.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any
from weakref import WeakValueDictionary

from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.utils.hooks import RemovableHandle

from gradwatch.hooks.callers import frames_of_threads
from gradwatch.hooks.instances import instances_of
from gradwatch.hooks.variables import local_variables


class NotedModules:
    """Notes each module that gets a parameter or a child, as long as it is attached.

    Refers to the modules weakly.
    """

    def __init__(self) -> None:
        # By id: a module may define == and be unhashable.
        self._noted: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()
        self._older: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Begins to note, by torch's hooks for all modules."""
        self._handles = [
            register_module_module_registration_hook(self._note),
            register_module_parameter_registration_hook(self._note),
        ]

    def close(self) -> None:
        """Notes no more; safe to call again."""
        for handle in self._handles:
            handle.remove()
        self._noted.clear()
        self._older.clear()

    def modules(self) -> list[nn.Module]:
        """Lists those that still exist."""
        return list(self._noted.values())

    def knows(self, module: nn.Module) -> bool:
        """Returns whether all that a module holds was noted, from its first parameter or child on.

        If so, what it is in has been noted as well. One that was built before, copied or unpickled
        may be in others of its kind.
        """
        return self._noted.get(id(module)) is module and id(module) not in self._older

    def _note(self, module: nn.Module, name: str, value: object) -> None:
        key = id(module)
        if key not in self._noted:
            self._noted[key] = module
            if values_of(module, "_parameters") or values_of(module, "_modules"):
                self._older[key] = module


def all_modules() -> list[nn.Module]:
    """Searches the process for its modules; those are among them that are garbage already."""
    return instances_of(nn.Module)


def frozen_modules() -> list[nn.Module]:
    """Lists the modules that ``gc.freeze()`` may have set aside, where no search finds them.

    They are reached from the imported modules and the variables of running functions, which takes
    a large part of a second; without a call of ``gc.freeze()`` there are none.
    """
    return instances_of(nn.Module, among=_reachable()) if gc.get_freeze_count() else []


def values_of(module: nn.Module, attribute: str) -> list[Any]:
    """Lists the parameters or the children of a module, without running code of its class.

    Args:
        module: Any module, also one whose constructor is still running.
        attribute: ``"_parameters"`` or ``"_modules"``.
    """
    held: Any = module.__dict__.get(attribute)
    # A scripted module has another kind of mapping.
    read: Callable[[], Iterable[Any]] = getattr(held, "values", tuple)
    values = dict.values(held) if isinstance(held, dict) else read()
    return [value for value in list(values) if value is not None]


def _reachable() -> list[Any]:
    found: dict[int, Any] = {}
    waiting = [sys.modules, *_variables()]
    while waiting:
        new = {id(one): one for one in waiting if id(one) not in found and gc.is_tracked(one)}
        found |= new
        waiting = gc.get_referents(*new.values())
    return list(found.values())


def _variables() -> list[Any]:
    """Lists the variables of all functions that are running, but for those in this room."""
    found: list[Any] = []
    # No variable may be left that refers to the frame of this function: it would be a cycle.
    waiting = list(frames_of_threads().values())
    while waiting:
        frame: FrameType | None = waiting.pop()
        while frame is not None:
            if not str(frame.f_globals.get("__name__")).startswith(__package__):
                found += local_variables(frame).values()
            frame = frame.f_back
    return found

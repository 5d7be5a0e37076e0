"""Acts right after a program has imported a module; a program that never does is left alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


def after_import(name: str, act: Callable[[], None]) -> None:
    """Calls a function once a top-level module has been imported: at once if it is there already.

    It is called in the thread that imports, before any other gets the module. An import that fails
    does not count: the next one does. Afterwards nothing of this is left: neither in
    ``sys.meta_path`` nor in the module.
    """
    if name in sys.modules:
        act()
    else:
        sys.meta_path.insert(0, _Finder(name, act))


class _Finder:
    """Lets the other finders find, and has the loader of one module call back."""

    def __init__(self, name: str, act: Callable[[], None]) -> None:
        self._name, self._act = name, act

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self._name:
            return None
        for finder in list(sys.meta_path):
            find: Any = None if finder is self else getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find is not None else None
            if spec is not None:
                self._call_back(spec.loader)
                return spec  # type: ignore[no-any-return]
        return None

    def _call_back(self, loader: Any) -> None:
        def loaded(module: ModuleType) -> None:
            del loader.exec_module  # the class's own is seen again, also by the module itself
            loader.exec_module(module)
            done()

        def done() -> None:
            if self in sys.meta_path:  # otherwise another thread's import was first
                sys.meta_path.remove(self)
                self._act()

        # Python takes the frames of its import system out of tracebacks as long as nothing is
        # between them.
        system = PathFinder.find_spec.__func__.__code__.co_filename  # type: ignore[attr-defined]
        loaded.__code__ = loaded.__code__.replace(co_filename=system)
        # On this one loader, so that `module.__spec__.loader` is the real one all along.
        if hasattr(loader, "__dict__") and hasattr(loader, "exec_module"):
            loader.exec_module = loaded

"""Hooks on modules that ``torch.jit.script()`` passes over: it compiles whatever else it finds."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn


class NotScripted:
    """A hook on a module that is no part of it; to be registered with scripting told to pass it."""


def hide_from_scripting() -> None:
    """Has ``torch.jit.script()`` pass over each hook that is a :class:`NotScripted`."""
    # Private, torch 2.4 to 2.13. Nobody else has a say in which hooks are compiled.
    recursive: Any = sys.modules.get("torch.jit._recursive")
    before = getattr(recursive, "get_hook_stubs", None)
    if before is None or hasattr(before, "hides"):
        return

    @functools.wraps(before)
    def get_hook_stubs(module: nn.Module) -> Any:
        with contextlib.ExitStack() as hidden:
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                hidden.enter_context(_without_ours(hooks))
            return before(module)

    get_hook_stubs.hides = NotScripted  # type: ignore[attr-defined]
    recursive.get_hook_stubs = get_hook_stubs


@contextlib.contextmanager
def _without_ours(hooks: dict[int, Any]) -> Iterator[None]:
    whole = list(hooks.items())
    for key, hook in whole:
        if isinstance(hook, NotScripted):
            del hooks[key]
    try:
        yield
    finally:
        hooks.clear()  # in the same order as before
        hooks.update(whole)

"""Optimizers as they are built, copied and unpickled, and those that were there before."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from gradwatch.hooks.instances import instances_of

_PATCHED = "_patch_step_function"


class BuiltOptimizers:
    """Tells of every optimizer that the process builds, copies or unpickles.

    Optimizers call one private method at all three occasions, to hook the step function of their
    class (torch 2.4 to 2.13). ``__init__`` alone would miss copies and checkpoints.
    """

    def __init__(
        self,
        on_built: Callable[[Optimizer], None],
        on_complete: Callable[[Optimizer], None] | None = None,
    ) -> None:
        """Begins to listen; neither function may raise.

        Args:
            on_built: Gets the optimizer when it is not complete yet: its parameter groups follow.
            on_complete: Gets an optimizer that was built when it holds its parameters. A copy, and
                one that was unpickled, is not told of. None if nobody asks.
        """
        self._on_built: Callable[[Optimizer], None] | None = on_built
        self._on_complete = on_complete
        self._replaced: list[tuple[str, Any, Any]] = []
        self._call_after(_PATCHED, lambda one: self._on_built and self._on_built(one))
        if on_complete is not None:
            self._call_after("__init__", lambda one: self._on_complete and self._on_complete(one))

    def _call_after(self, name: str, call: Callable[[Optimizer], object]) -> None:
        before: Callable[..., None] = getattr(Optimizer, name)

        @functools.wraps(before)
        def and_tell(optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
            before(optimizer, *args, **kwargs)
            call(optimizer)

        setattr(Optimizer, name, and_tell)
        self._replaced.append((name, before, and_tell))

    def remove(self) -> None:
        """Stops listening; safe to call again."""
        self._on_built = self._on_complete = None
        for name, before, ours in self._replaced:
            # Somebody else may have wrapped ours since: then it stays, and does nothing.
            if getattr(Optimizer, name) is ours:
                setattr(Optimizer, name, before)
        self._replaced = []


def optimizers_there() -> list[Optimizer]:
    """Lists the optimizers that the process has now, in the order in which gc knows them."""
    return instances_of(Optimizer)


def is_complete(optimizer: Optimizer) -> bool:
    """Returns whether an optimizer has been built as far as to hold parameters."""
    groups: list[dict[str, Any]] = getattr(optimizer, "param_groups", [])
    return bool(groups) and all("params" in group for group in groups)

"""Optimizers as they are built, copied and unpickled, and those that were there before."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

_PATCHED = "_patch_step_function"


class BuiltOptimizers:
    """Tells of every optimizer that the process builds, copies or unpickles.

    Optimizers call one private method at all three occasions, to hook the step function of their
    class (torch 2.4 to 2.13). ``__init__`` alone would miss copies and checkpoints.
    """

    def __init__(self, on_built: Callable[[Optimizer], None]) -> None:
        """Begins to listen.

        ``on_built`` gets the optimizer when it is not complete yet: its parameter groups follow.
        It must not raise.
        """
        self._on_built: Callable[[Optimizer], None] | None = on_built
        before: Callable[..., None] = getattr(Optimizer, _PATCHED)
        listens = self

        @functools.wraps(before)
        def patch_step_function(optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
            before(optimizer, *args, **kwargs)
            if listens._on_built is not None:
                listens._on_built(optimizer)

        self._before, self._ours = before, patch_step_function
        setattr(Optimizer, _PATCHED, patch_step_function)

    def remove(self) -> None:
        """Stops listening; safe to call again."""
        self._on_built = None
        # Somebody else may have wrapped ours since: then it stays, and does nothing.
        if getattr(Optimizer, _PATCHED) is self._ours:
            setattr(Optimizer, _PATCHED, self._before)


def optimizers_there() -> list[Optimizer]:
    """Lists the optimizers that the process has now, in the order in which gc knows them."""
    # torch keeps no list of them. Not isinstance(), which reads __class__: on a proxy object this
    # may raise an error.
    return [one for one in gc.get_objects() if issubclass(type(one), Optimizer)]


def is_complete(optimizer: Optimizer) -> bool:
    """Returns whether an optimizer has been built as far as to hold parameters."""
    groups: list[dict[str, Any]] = getattr(optimizer, "param_groups", [])
    return bool(groups) and all("params" in group for group in groups)

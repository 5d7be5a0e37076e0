"""OptimizerDiscovery: finds the optimizers that step watched parameters, at their first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from gradwatch.observe.parameters import optimizer_parameters


class OptimizerDiscovery:
    """Looks at every optimizer of the process when it steps, once each."""

    def __init__(self, owned: set[int], on_found: Callable[[Optimizer], None]) -> None:
        """Registers torch's global optimizer-step hook.

        Args:
            owned: ``id`` of every watched parameter.
            on_found: Called before the first step of an optimizer that holds one of them; a step
                hook that it registers on the optimizer still runs for this very step.
        """
        self._owned = owned
        self._on_found = on_found
        self._seen: WeakSet[Optimizer] = WeakSet()
        self._handle: RemovableHandle | None = register_optimizer_step_pre_hook(self._look)

    def remove(self) -> None:
        """Takes the hook off; safe to call again."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _look(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if optimizer in self._seen:
            return
        self._seen.add(optimizer)
        if any(id(parameter) in self._owned for parameter in optimizer_parameters(optimizer)):
            self._on_found(optimizer)

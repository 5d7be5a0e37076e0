"""StepBoundary: the moments before and after an optimizer step, closures included."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gradwatch.control.skip import GradientStash, OptimizerCheckpoint
from gradwatch.observe.parameters import optimizer_parameters

Closure = Callable[[], Any]


class StepListener(Protocol):
    """Who is told about the steps of one optimizer."""

    def begin(self, optimizer: Optimizer, has_closure: bool) -> None:
        """A step begins; a closure, if there is one, has not run yet."""

    def settle(self, optimizer: Optimizer, loss: object) -> bool:
        """The gradients that the step will use stand: look at them, change them, and decide.

        Returns:
            Whether the optimizer may use them.
        """

    def finish(self, optimizer: Optimizer) -> None:
        """The step is over."""


class StepBoundary:
    """Stands around every step of one optimizer, through its own step hooks."""

    def __init__(
        self,
        optimizer: Optimizer,
        listener: StepListener,
        shield: AbstractContextManager[None],
        may_refuse: bool,
    ) -> None:
        """Registers the hooks.

        Args:
            optimizer: The optimizer.
            listener: Who is told.
            shield: What to stand inside of while it is told, and may hold its errors back.
            may_refuse: Whether the listener may refuse a step or raise; only then an optimizer
                that evaluates its closure several times is copied before the step.
        """
        self._optimizer = optimizer
        self._listener = listener
        self._shield = shield
        self._may_refuse = may_refuse
        self._stash = GradientStash()
        self._checkpoint: OptimizerCheckpoint | None = None
        self._refused = False
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Takes the hooks off; safe to call again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._refused:
            self._stash.restore()  # left over where the step before raised
        self._refused = False
        self._checkpoint = None
        closure = _closure_of(args, kwargs) if kwargs or len(args) > 1 else None
        with self._shield:
            self._listener.begin(optimizer, closure is not None)
            if closure is None:
                self._settle(None)
        if closure is None:
            return None
        if self._may_refuse and _evaluates_repeatedly(optimizer):
            self._checkpoint = OptimizerCheckpoint(optimizer, optimizer_parameters(optimizer))
        return _with_closure(args, kwargs, self._wrap(closure))

    def _wrap(self, closure: Closure) -> Closure:
        last: Any = None

        def evaluate() -> Any:
            nonlocal last
            if not self._refused:
                last = closure()
                with self._shield:
                    self._settle(last)
            return last

        return evaluate

    def _settle(self, loss: object) -> None:
        try:
            self._refused = not self._listener.settle(self._optimizer, loss)
        except BaseException:
            self._restore_checkpoint()
            raise
        if self._refused:
            self._stash.hide(optimizer_parameters(self._optimizer))

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._refused:
            self._restore_checkpoint()
            self._stash.restore()
        self._checkpoint = None
        with self._shield:
            self._listener.finish(optimizer)

    def _restore_checkpoint(self) -> None:
        if self._checkpoint is not None:
            self._checkpoint.restore()
            self._checkpoint = None


def _evaluates_repeatedly(optimizer: Optimizer) -> bool:
    return isinstance(optimizer, torch.optim.LBFGS)


def _closure_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Closure | None:
    """Finds the closure; ``args[0]`` is the optimizer itself."""
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    return closure if callable(closure) else None


def _with_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], closure: Closure
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if "closure" in kwargs:
        return args, {**kwargs, "closure": closure}
    return (args[0], closure, *args[2:]), kwargs

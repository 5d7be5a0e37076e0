"""Leaving a step out: afterwards everything is as if its batch had not been."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class GradientStash:
    """Hides the gradients from an optimizer, which then has nothing to do.

    Every optimizer passes over a parameter whose ``.grad`` is None, moments and step count
    included.
    """

    def __init__(self) -> None:
        """Starts with nothing hidden."""
        self._hidden: list[tuple[Tensor, Tensor]] = []

    def hide(self, parameters: Sequence[Tensor]) -> None:
        """Takes the gradients away.

        Args:
            parameters: All parameters of the optimizer.
        """
        self._hidden = [(p, p.grad) for p in parameters if p.grad is not None]
        for parameter, _ in self._hidden:
            parameter.grad = None

    def restore(self) -> None:
        """Gives the gradients back; does nothing where none are hidden."""
        for parameter, gradient in self._hidden:
            parameter.grad = gradient
        self._hidden = []


class OptimizerCheckpoint:
    """Parameters and optimizer state before a step that evaluates its closure several times.

    Such an optimizer (LBFGS) has moved the parameters by the time that a later evaluation turns
    out bad. It costs a copy of both, so it is made for those optimizers only.
    """

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        """Copies both.

        Args:
            optimizer: The optimizer that is about to step.
            parameters: Its parameters.
        """
        self._optimizer = optimizer
        self._values = [(p, p.detach().clone()) for p in parameters]
        self._state = {p: copy.deepcopy(dict(s)) for p, s in optimizer.state.items()}

    def restore(self) -> None:
        """Puts both back, in place."""
        with torch.no_grad():
            for parameter, value in self._values:
                parameter.copy_(value)
        state: dict[Any, Any] = self._optimizer.state
        for key in [key for key in state if key not in self._state]:
            del state[key]
        for key, saved in self._state.items():
            state[key].clear()
            state[key].update(saved)

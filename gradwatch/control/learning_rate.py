"""ScaledLearningRate: a learning rate that follows the batch, during the step only."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer


class ScaledLearningRate:
    """Multiplies the learning rates of an optimizer for one step, and puts them back after it.

    So they stay what the user, or a scheduler, has made them: nothing adds up, and a schedule
    that works them out from the last one, or from the step, goes on as it would have.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        """Changes nothing yet.

        Args:
            optimizer: Its groups may hold numbers or tensors.
        """
        self._optimizer = optimizer
        self._before: list[tuple[dict[str, Any], Any]] = []

    def scale(self, factor: float) -> None:
        """Multiplies them, until :meth:`restore`.

        Args:
            factor: Positive; 1.0 changes nothing.
        """
        if factor == 1.0:
            return
        groups = [group for group in self._optimizer.param_groups if "lr" in group]
        self._before = [(group, group["lr"]) for group in groups]
        for group, rate in self._before:
            group["lr"] = rate * factor

    def restore(self) -> None:
        """Puts them back; does nothing where nothing was changed."""
        for group, rate in self._before:
            group["lr"] = rate
        self._before = []

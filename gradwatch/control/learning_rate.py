"""Learning rates: the one that is recorded, and one that follows the batch during a step."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from gradwatch.observe.readings import Number, reading_of


def learning_rate(optimizer: Optimizer) -> Number:
    """Returns the learning rate of the first parameter group; NaN where it has none.

    Args:
        optimizer: The optimizer.
    """
    groups = optimizer.param_groups
    value = groups[0].get("lr", math.nan) if groups else math.nan
    return reading_of(value) if isinstance(value, Tensor) else float(value)


class ScaledLearningRate:
    """Multiplies the learning rates of an optimizer for one step, and puts them back after it.

    So they stay what the user, or a scheduler, has made them: nothing adds up, and a schedule
    that works them out from the last one, or from the step, goes on as it would have.

    Attributes:
        saved: Groups and rates that are to be put back.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        """Changes nothing yet.

        Args:
            optimizer: Its groups may hold numbers or tensors.
        """
        self._optimizer = optimizer
        self.saved: list[tuple[dict[str, Any], Any]] = []

    def scale(self, factor: float) -> None:
        """Multiplies them, until :meth:`restore`.

        Args:
            factor: Positive; 1.0 changes nothing.
        """
        if factor == 1.0:
            return
        groups = [group for group in self._optimizer.param_groups if "lr" in group]
        self.saved = [(group, group["lr"]) for group in groups]
        for group, rate in self.saved:
            group["lr"] = rate * factor

    def restore(self) -> None:
        """Puts them back; does nothing where nothing was changed."""
        for group, rate in self.saved:
            group["lr"] = rate
        self.saved = []

"""LossScale: what a GradScaler has done to the gradients, so that every number is a true one."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradwatch.observe.readings import Number, number, reading_of


class LossScale:
    """Reads the loss scale of a ``torch.amp.GradScaler``, or stands for its absence."""

    def __init__(self, scaler: torch.amp.GradScaler | None) -> None:
        """Reads from a scaler.

        Args:
            scaler: The scaler of the training loop; None where there is none.
        """
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None

    @property
    def active(self) -> bool:
        """Whether there is a scaler, and so steps may be left out by it."""
        return self._scaler is not None

    def value(self) -> Number:
        """Returns the factor that the loss, and so each gradient, is multiplied with now."""
        if self._scaler is None:
            return 1.0
        scale = self._scaler._scale
        return self._scaler.get_scale() if scale is None else reading_of(scale)

    def lowered_since(self, earlier: Number) -> bool:
        """Tells whether the scaler has lowered its scale: it has met a gradient that overflowed.

        On an accelerator it waits for the device.

        Args:
            earlier: An earlier value.
        """
        return number(self.value()) < number(earlier)

    def left_in(self, optimizer: Optimizer | None) -> Number:
        """Returns the factor that the gradients still carry when the optimizer's step begins.

        A fused optimizer unscales inside its step and carries ``grad_scale`` for it; for every
        other one the scaler has unscaled the gradients already.

        Args:
            optimizer: The optimizer that is about to step; None where there is none.

        Returns:
            The factor, 1.0 where the gradients are true.
        """
        return _carried(optimizer, "grad_scale", 1.0)

    @staticmethod
    def found_inf(optimizer: Optimizer | None) -> Number:
        """Tells whether the scaler has asked a fused optimizer not to apply this step.

        Args:
            optimizer: The optimizer that is about to step; None where there is none.

        Returns:
            A number above 0 if it has.
        """
        return _carried(optimizer, "found_inf", 0.0)


def _carried(optimizer: Optimizer | None, name: str, otherwise: float) -> Number:
    value = cast("Tensor | float | None", getattr(optimizer, name, None))
    if value is None:
        return otherwise
    return reading_of(value) if isinstance(value, Tensor) else float(value)

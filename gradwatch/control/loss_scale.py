"""LossScale: what a GradScaler has done to the gradients, so that every number is a true one."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer


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

    def value(self) -> float:
        """Returns the factor that the loss, and so each gradient, is multiplied with now."""
        return 1.0 if self._scaler is None else float(self._scaler.get_scale())

    def left_in(self, optimizer: Optimizer | None) -> float:
        """Returns the factor that the gradients still carry when the optimizer's step begins.

        A fused optimizer unscales inside its step and carries ``grad_scale`` for it; for every
        other one the scaler has unscaled the gradients already.

        Args:
            optimizer: The optimizer that is about to step; None where there is none.

        Returns:
            The factor, 1.0 where the gradients are true.
        """
        scale = cast("Tensor | None", getattr(optimizer, "grad_scale", None))
        return 1.0 if scale is None else float(scale)

    @staticmethod
    def found_inf(optimizer: Optimizer | None) -> bool:
        """Tells whether the scaler has asked a fused optimizer not to apply this step.

        Args:
            optimizer: The optimizer that is about to step; None where there is none.
        """
        found: Any = getattr(optimizer, "found_inf", None)
        return found is not None and bool(float(found))

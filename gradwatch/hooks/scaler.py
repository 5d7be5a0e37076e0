"""LossScale: what a GradScaler has done to the gradients, so that every number is a true one."""

from __future__ import annotations

import gc
import sys
from types import FrameType
from typing import Any

import torch
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from gradwatch.measure.deferred import FloatOrDeferred, defer_copy, resolve


class LossScale:
    """Reads the loss scale of a ``torch.amp.GradScaler``, or stands for its absence.

    Attributes:
        scaler: The scaler; None where there is none, and so no step is left out by one.
        looked: Whether that is known, until an optimizer steps.
        candidates: Scalers of which one may be the loop's, until an optimizer steps.
    """

    def __init__(self, scaler: torch.amp.GradScaler | None) -> None:
        """Reads from the scaler of the training loop; None where there is none."""
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.candidates: list[torch.amp.GradScaler] = []
        self.looked = scaler is not None

    def look(self) -> None:
        """Looks for the scaler of the loop, in the first backward, where none was given.

        One that has scaled something by then, and that the code which called the backward has at
        hand, is taken for it until an optimizer steps; that tells for certain.
        """
        self.looked = True
        # Of the scale only GradScaler.get_scale() is public, which waits for the device; and whose
        # steps a scaler serves it keeps to itself. All private names here: torch 2.4 to 2.13.
        self.candidates = [scaler for scaler in _scalers() if scaler._scale is not None]
        self.scaler = _at_hand(self.candidates, sys._getframe())

    def keep_scaler_of(self, optimizer: Optimizer) -> None:
        """Keeps the scaler that unscales the gradients of a step, and forgets all others."""
        serving = [scaler for scaler in self.candidates if _serves(scaler, optimizer)]
        self.scaler = serving[0] if serving else None
        self.candidates = []

    def value(self) -> FloatOrDeferred:
        """Returns the factor that the loss, and so each gradient, is multiplied with now."""
        if self.scaler is None:
            return 1.0
        scale = self.scaler._scale  # None until it has scaled a loss
        return self.scaler.get_scale() if scale is None else defer_copy(scale)

    def generation(self) -> object:
        """Returns an object that is another one after each ``update()`` of the scaler.

        Asking for it does not wait for the device.
        """
        # update() begins what the scaler knows of its optimizers anew, in a new dict.
        return None if self.scaler is None else self.scaler._per_optimizer_states

    def lowered_since(self, earlier: FloatOrDeferred) -> bool:
        """Tells whether the scaler has lowered its scale: it has met a gradient that overflowed.

        On an accelerator it waits for the device.
        """
        return resolve(self.value()) < resolve(earlier)


def _scalers() -> list[torch.amp.GradScaler]:
    """Lists every enabled scaler of the process."""
    # torch keeps no list of them. The class of an object, not isinstance(): that asks proxies,
    # which may answer with an error.
    objects = [o for o in gc.get_objects() if issubclass(type(o), torch.amp.GradScaler)]
    return [scaler for scaler in objects if scaler.is_enabled()]


def _at_hand(
    scalers: list[torch.amp.GradScaler], frame: FrameType | None
) -> torch.amp.GradScaler | None:
    """Picks the one that the code which called the backward has at hand; None if it has none."""
    # A scaler of another loop, or of an earlier run that is still in memory, must not be taken:
    # norms would be divided by a scale that they never had.
    while frame is not None and scalers:
        own: dict[str, Any] = getattr(frame.f_locals.get("self"), "__dict__", {})
        values = [*frame.f_locals.values(), *own.values(), *frame.f_globals.values()]
        held = [scaler for scaler in scalers if any(value is scaler for value in values)]
        if held:
            return held[0] if len(held) == 1 else None
        frame = frame.f_back
    return None


def _serves(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> bool:
    """Tells whether a scaler has unscaled, or is stepping, an optimizer since its last update."""
    state = scaler._per_optimizer_states.get(id(optimizer))
    return state is not None and state["stage"] is not OptState.READY

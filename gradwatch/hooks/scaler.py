"""LossScale: the factor of a GradScaler, by which norms are divided to be in true units."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any
from weakref import WeakSet

import torch
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from gradwatch.hooks.instances import instances_of
from gradwatch.hooks.variables import local_variables
from gradwatch.measure.deferred import FloatOrDeferred, defer_copy, resolve


class LossScale:
    """The loss scale of a ``torch.amp.GradScaler``; 1 if the loop has none.

    Attributes:
        scaler: The scaler of the loop; None if there is none, or none that is enabled.
        looked: Whether the scaler was given, or has been searched for.
        candidates: Scalers of which one may be the loop's; kept until an optimizer steps.
    """

    def __init__(self, scaler: torch.amp.GradScaler | None) -> None:
        """Uses the scaler of the training loop; with None it is searched for in the first backward.

        A scaler that is not enabled counts as none.
        """
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.candidates: list[torch.amp.GradScaler] = []
        self.looked = scaler is not None

    def look(self) -> None:
        """Looks for the scaler of the loop in the first backward, if none was given.

        A scaler that has already scaled a loss, and that a variable of the calling code refers to,
        is assumed to be the loop's until an optimizer steps. Then it is known for certain.
        """
        self.looked = True
        # The only public access to the scale is GradScaler.get_scale(), which waits for the device,
        # and there is none to the optimizers that a scaler serves. The private names in this file
        # are the same in torch 2.4 to 2.13.
        self.candidates = [scaler for scaler in _scalers() if scaler._scale is not None]
        self.scaler = _at_hand(self.candidates, sys._getframe())

    def keep_scaler_of(self, optimizer: Optimizer) -> None:
        """Keeps the candidate that unscales the gradients of this optimizer; drops the others."""
        serving = [scaler for scaler in self.candidates if _serves(scaler, optimizer)]
        self.scaler = serving[0] if serving else None
        self.candidates = []

    def value(self) -> FloatOrDeferred:
        """Returns the factor by which the loss, and so each gradient, is multiplied now."""
        if self.scaler is None:
            return 1.0
        scale = self.scaler._scale  # None until it has scaled a loss
        return self.scaler.get_scale() if scale is None else defer_copy(scale)

    def generation(self) -> object:
        """Returns an object that ``update()`` of the scaler replaces by a new one.

        So two calls tell, without waiting for the device, whether the scaler has updated.
        """
        # update() makes a new dict for the state of the optimizers.
        return None if self.scaler is None else self.scaler._per_optimizer_states

    def lowered_since(self, earlier: FloatOrDeferred) -> bool:
        """Returns whether the scaler has lowered its scale, as it does after an overflow.

        On an accelerator this waits for the device.
        """
        return resolve(self.value()) < resolve(earlier)


def _scalers() -> list[torch.amp.GradScaler]:
    """Lists every enabled scaler of the process."""
    found = list(_noted[-1]) if _noted else instances_of(torch.amp.GradScaler)
    return [scaler for scaler in found if scaler.is_enabled()]


_noted: list[WeakSet[torch.amp.GradScaler]] = []


@contextmanager
def noted_scalers() -> Iterator[None]:
    """Notes the scalers that are built, so that no others need be searched for.

    To be entered before the first one is built.
    """
    noted: WeakSet[torch.amp.GradScaler] = WeakSet()

    def note_after(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def call(scaler: torch.amp.GradScaler, *args: Any, **kwargs: Any) -> None:
            function(scaler, *args, **kwargs)
            noted.add(scaler)

        return call

    kind: Any = torch.amp.GradScaler
    before = {name: getattr(kind, name) for name in ("__init__", "__setstate__")}
    after = {name: note_after(function) for name, function in before.items()}
    for name, function in after.items():
        setattr(kind, name, function)
    _noted.append(noted)
    try:
        yield
    finally:
        _noted.remove(noted)
        for name, function in after.items():
            if getattr(kind, name) is function:  # else somebody has wrapped ours since
                setattr(kind, name, before[name])


def _at_hand(
    scalers: list[torch.amp.GradScaler], frame: FrameType | None
) -> torch.amp.GradScaler | None:
    """Picks the one scaler that the calling code refers to; None if there is none, or several.

    The frames are searched from the innermost outwards: local variables, attributes of ``self``,
    and globals.
    """
    # A scaler of another loop, or one of an earlier run that is still in memory, must not be
    # chosen: norms would be divided by a scale that was never applied to them.
    while frame is not None and scalers:
        variables = local_variables(frame)
        own: dict[str, Any] = getattr(variables.get("self"), "__dict__", {})
        values = [*variables.values(), *own.values(), *frame.f_globals.values()]
        held = [scaler for scaler in scalers if any(value is scaler for value in values)]
        if held:
            return held[0] if len(held) == 1 else None
        frame = frame.f_back
    return None


def _serves(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> bool:
    """Returns whether a scaler has unscaled or stepped an optimizer since its last update."""
    state = scaler._per_optimizer_states.get(id(optimizer))
    return state is not None and state["stage"] is not OptState.READY

"""LossScale: the factor of a GradScaler, by which norms are divided to be in true units."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from gradwatch.hooks.callers import callers, walk
from gradwatch.hooks.entry import BeforeBackward, Roots
from gradwatch.hooks.instances import instances_of
from gradwatch.hooks.variables import local_variables
from gradwatch.measure.deferred import FloatOrDeferred, defer_copy, resolve

# The only public access to the scale is GradScaler.get_scale(), which waits for the device, and
# there is none to the optimizers that a scaler serves. The private names in this file are the same
# in torch 2.4 to 2.13.

_NEAR = 32
"""Nodes from the root on among which a scaler may have multiplied the loss."""

MOST_LOOKS = 64
"""Backwards that are looked at, if no optimizer steps."""

_STEPPING = (torch.amp.GradScaler._maybe_opt_step.__code__, torch.amp.GradScaler.step.__code__)


class LossScale:
    """The loss scale of a ``torch.amp.GradScaler``; 1 if the loop has none.

    Attributes:
        scaler: The scaler of the loop; None if there is none, or none that is enabled.
    """

    __slots__ = ("scaler",)

    def __init__(self, scaler: torch.amp.GradScaler | None) -> None:
        """Uses a scaler; one that is not enabled counts as none."""
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None

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

    @staticmethod
    def asked_to_step(generation: object) -> frozenset[int]:
        """Returns the ids of the optimizers that ``scaler.step()`` was called for; never waits.

        If such an optimizer has not stepped, the scaler has found an overflow: for that it has
        waited by itself.

        Args:
            generation: What :meth:`generation` returned before the scaler updated.
        """
        states: dict[int, Any] = generation if isinstance(generation, dict) else {}
        return frozenset(i for i, one in states.items() if one["stage"] is OptState.STEPPED)

    def lowered_since(self, earlier: FloatOrDeferred) -> bool:
        """Returns whether the scaler has lowered its scale, as it does after an overflow.

        On an accelerator this waits for the device.
        """
        return resolve(self.value()) < resolve(earlier)


class FoundScale(LossScale):
    """The loss scale of the backward that came last; its scaler is searched for if none was given.

    Which scaler has multiplied a loss is seen in the graph of its backward, and otherwise in the
    variables of the code that has called it. Which one serves an optimizer is certain when that
    steps. Until all optimizers have stepped, each backward is looked at.

    Attributes:
        looks: How many backwards are still looked at, at most.
    """

    __slots__ = ("_before", "_known", "looks")

    def __init__(self, scaler: torch.amp.GradScaler | None) -> None:
        """Uses the scaler of the training loop; with None it is searched for."""
        super().__init__(scaler)
        self.looks = 0 if scaler is not None else MOST_LOOKS
        self._known: WeakSet[torch.amp.GradScaler] | None = None
        self._before = BeforeBackward(_note_factors)

    def wait(self) -> None:
        """Has backwards looked at from now on, if no scaler was given."""
        if self.looks:
            self._before.wait()

    def end(self) -> None:
        """Has no more of them looked at; safe to call again."""
        self.looks = 0
        self._before.stop()

    def look(self) -> None:
        """Looks which scaler has scaled the loss of the backward under way, if any has."""
        self.looks -= 1
        if self._known is None:
            self._known = WeakSet(_scalers())
        # Without a scaler in the process there is nothing to look for. One that is built later is
        # found when it steps.
        if not self._known or not self.looks:
            self.end()
        in_use = [one for one in self._known if one._scale is not None]
        factors = _factors_under_way()
        scaled_by = [one for one in in_use if any(one._scale is factor for factor in factors)]
        if len(scaled_by) == 1:
            self.scaler = scaled_by[0]
        else:  # the loss may have been scaled on another device, or in compiled code
            self.scaler = _at_hand(in_use, callers(sys._getframe()))

    def serving(self, optimizer: Optimizer) -> torch.amp.GradScaler | None:
        """Returns the scaler that is stepping an optimizer, or has unscaled its gradients."""
        stepping = _stepping(sys._getframe())
        if stepping is not None:
            return stepping
        return next((one for one in self._known or () if _serves(one, optimizer)), None)


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
    scalers: Sequence[torch.amp.GradScaler], frames: Iterator[FrameType]
) -> torch.amp.GradScaler | None:
    """Picks the one scaler that the calling code refers to; None if there is none, or several.

    The frames are searched from the innermost outwards: local variables, attributes of ``self``,
    and globals.
    """
    # A scaler of another loop, or one of an earlier run that is still in memory, must not be
    # chosen: norms would be divided by a scale that was never applied to them.
    for frame in frames if scalers else ():
        variables = local_variables(frame)
        own: dict[str, Any] = getattr(variables.get("self"), "__dict__", {})
        values = [*variables.values(), *own.values(), *frame.f_globals.values()]
        held = [scaler for scaler in scalers if any(value is scaler for value in values)]
        if held:
            return held[0] if len(held) == 1 else None
    return None


def _serves(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> bool:
    """Returns whether a scaler has unscaled or stepped an optimizer since its last update."""
    state = scaler._per_optimizer_states.get(id(optimizer))
    return state is not None and state["stage"] is not OptState.READY


def _stepping(frame: FrameType | None) -> torch.amp.GradScaler | None:
    """Returns the scaler that calls the step under way, by the call stack.

    Before the step of a fused optimizer, which unscales by itself, nothing else shows it.
    """
    while frame is not None:
        if frame.f_code in _STEPPING:
            scaler: torch.amp.GradScaler = local_variables(frame)["self"]
            return scaler if scaler.is_enabled() else None
        frame = frame.f_back
    return None


# -- the factors of a loss -------------------------------------------------------------------------

# What is set under a key is there in the hooks of a backward as well, also where a thread of
# torch's own runs them, and only in those of the backwards that the thread has called.
_KEY = "gradwatch.factors"


def _note_factors(roots: Roots) -> Callable[[], None] | None:
    """Notes what the loss of a backward was multiplied by; must be called before it begins."""
    try:
        before = _factors_under_way()
        factors = [*before, *_factors_of(roots)]
    except Exception:  # a graph of another torch: then the calling code may tell
        return None
    torch._C._stash_obj_in_tls(_KEY, factors)

    def forget() -> None:
        factors.clear()  # a thread of torch's own may keep the list for a while
        torch._C._stash_obj_in_tls(_KEY, before)

    return forget


def _factors_under_way() -> list[Tensor]:
    if not torch._C._is_key_in_tls(_KEY):
        return []
    found: list[Tensor] = torch._C._get_obj_in_tls(_KEY)
    return found


def _factors_of(roots: Roots) -> Iterator[Tensor]:
    nodes = [one.grad_fn if isinstance(one, Tensor) else one.node for one in roots]
    for node in walk(nodes, _NEAR):
        # A saved tensor is freed as soon as its node has run. Unpacking runs hooks of the user's.
        if node.name() != "MulBackward0":
            continue
        if getattr(node._raw_saved_other, "unpack_hook", None) is None:
            factor = node._saved_other
            if isinstance(factor, Tensor) and not factor.dim() and not factor.requires_grad:
                yield factor

"""FusedStep: tells a fused optimizer on the device by how much to scale, and whether to step.

A fused optimizer reads two attributes that ``torch.amp.GradScaler`` sets for it: it divides the
gradients by ``grad_scale`` inside its kernel, and leaves everything as it is where ``found_inf`` is
1. So a clip costs no pass over the gradients, and a skip no wait for the device. Other optimizers
pass over the attributes in silence, which is why a trial decides.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradwatch.observe.shards import is_sharded

_NOTHING = object()
_NAMES = ("grad_scale", "found_inf")


class FusedStep:
    """The two attributes of one optimizer, during one step.

    Attributes:
        saved: What is to be put back, by name.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        """Tries out whether the optimizer listens to the attributes.

        Args:
            optimizer: Any optimizer.
        """
        self._optimizer = optimizer
        self._listens = _is_fused(optimizer) and _listens(optimizer)
        self.saved: dict[str, Any] = {}

    @property
    def can_scale(self) -> bool:
        """Whether it would scale now; ``load_state_dict`` can make it an unfused one."""
        return self._listens and _is_fused(self._optimizer)

    @property
    def can_skip(self) -> bool:
        """Whether it would leave a step out cleanly now.

        Fused SGD makes its momentum buffers in the first step and leaves them uninitialised where
        that one is skipped, so there the gradients have to be hidden instead.
        """
        return self.can_scale and not _lacks_momentum_buffer(self._optimizer)

    def scale(self, factor: float | Tensor, device: torch.device) -> None:
        """Has the step multiply the gradients.

        Args:
            factor: Number or tensor ``[]``, above 0.
            device: Where the gradients are.
        """
        if not isinstance(factor, Tensor):  # filled in on the device: a copy to it would wait
            factor = torch.full((), factor, dtype=torch.float64, device=device)
        divisor = factor.reciprocal().float()
        scale = getattr(self._optimizer, "grad_scale", None)
        self._set("grad_scale", divisor if scale is None else scale * divisor)

    def refuse(self, refusal: Tensor) -> None:
        """Has the step leave everything as it is where a flag says so.

        Args:
            refusal: Tensor ``[]``, float32, 1 to leave the step out and 0 to take it.
        """
        found = getattr(self._optimizer, "found_inf", None)
        flag = refusal if found is None else torch.maximum(found, refusal.to(found.device))
        self._set("found_inf", flag.clamp(max=1.0))

    def restore(self) -> None:
        """Puts the attributes back as they were; does nothing where none was set."""
        for name, value in self.saved.items():
            if value is _NOTHING:
                delattr(self._optimizer, name)
            else:
                setattr(self._optimizer, name, value)
        self.saved = {}

    def _set(self, name: str, value: Tensor) -> None:
        self.saved.setdefault(name, getattr(self._optimizer, name, _NOTHING))
        setattr(self._optimizer, name, value)


def _is_fused(optimizer: Optimizer) -> bool:
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False)) and all(
        group.get("fused") for group in optimizer.param_groups
    )


def _lacks_momentum_buffer(optimizer: Optimizer) -> bool:
    return isinstance(optimizer, torch.optim.SGD) and any(
        group["momentum"] != 0 and optimizer.state.get(parameter, {}).get("momentum_buffer") is None
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    )


@torch.no_grad()
def _listens(optimizer: Optimizer) -> bool:
    """Steps an optimizer of the same kind on two numbers, scaled, and then told not to step."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not parameters or any(map(is_sharded, parameters)):
        return False
    device = parameters[0].device
    try:
        scaled, plain = (torch.ones(2, device=device, requires_grad=True) for _ in range(2))
        accepted = inspect.signature(type(optimizer)).parameters
        options = {name: value for name, value in optimizer.defaults.items() if name in accepted}
        options |= {"lr": 0.1, "fused": True}
        trials = [type(optimizer)([p], **options) for p in (scaled, plain)]
        scaled.grad, plain.grad = torch.full_like(scaled, 4.0), torch.ones_like(plain)
        told: list[Any] = trials
        told[0].grad_scale = torch.full((), 4.0, device=device)
        for trial in trials:
            trial.step()
        if not torch.equal(scaled, plain) or torch.equal(plain, torch.ones_like(plain)):
            return False
        told[1].found_inf = torch.ones((), device=device)
        before = plain.clone()
        trials[1].step()
        return torch.equal(plain, before)
    except Exception:  # an optimizer of another make may take other arguments, or refuse these
        return False

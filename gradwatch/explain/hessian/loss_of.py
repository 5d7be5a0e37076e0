"""A loss in the forms in which users have one: a function, a function of the model, a tensor."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradwatch.explain.hessian.not_finite import NotFiniteError

Loss: TypeAlias = Tensor | Callable[[], Tensor] | Callable[[Any], Tensor]

_NOT_A_LOSS = (
    "curvature(loss=) was given {given}, and needs the loss or a way to compute it. Write "
    "curvature(model, lambda: criterion(model(x), y)), or pass the tensor itself."
)
_NOT_SCALAR = (
    "The loss has the shape {shape}, and a Hessian belongs to one number. Write loss.mean() or "
    "loss.sum()."
)
_NOT_FINITE = (
    "The loss is {loss}, so it has no Hessian. Find out what made it so first: gradwatch.watch "
    "names the first bad gradient."
)
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def check_loss(loss: object) -> None:
    """Refuses what is neither a tensor nor a function of no argument or one.

    Raises:
        TypeError: In that case.
    """
    if not isinstance(loss, Tensor) and not (callable(loss) and arguments(loss) in (0, 1)):
        raise TypeError(_NOT_A_LOSS.format(given=_describe(loss)))


def evaluate_loss(model: nn.Module | Mapping[str, Tensor], loss: Loss) -> Tensor:
    """Computes the loss, by operations that can be differentiated twice where there is a choice.

    Args:
        model: What a function with an argument is given, once it is unwrapped and uncompiled.
        loss: The loss or the function.

    Returns:
        Tensor with one element.

    Raises:
        TypeError: If the function returns no tensor.
        ValueError: If the loss is not one number.
        NotFiniteError: If it is not finite.
    """
    value = loss if isinstance(loss, Tensor) else _call(model, loss)
    if not isinstance(value, Tensor):
        raise TypeError(_NOT_A_LOSS.format(given=f"a function that returns {_describe(value)}"))
    if value.numel() != 1:
        raise ValueError(_NOT_SCALAR.format(shape=list(value.shape)))
    if not bool(torch.isfinite(value.detach())):
        raise NotFiniteError(_NOT_FINITE.format(loss=float(value.detach())))
    return value


def _call(model: nn.Module | Mapping[str, Tensor], loss: Callable[..., Any]) -> Any:
    model = _unwrapped(model)
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if isinstance(model, nn.Module) and any(isinstance(m, nn.RNNBase) for m in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        return loss(model) if arguments(loss) else loss()


def _unwrapped(model: Any) -> Any:
    """Takes the module out of what reduces gradients, and of what torch.compile made of it."""
    while isinstance(model, _WRAPPERS) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, _WRAPPERS) else model._orig_mod
    return model


def arguments(function: Callable[..., Any]) -> int:
    """Counts the arguments that must be given; modules that are losses take those of forward.

    Args:
        function: The function, or a module.
    """
    call = function.forward if isinstance(function, nn.Module) else function
    try:
        parameters = inspect.signature(call).parameters.values()
    except ValueError:  # written in C, without a signature
        return 0
    return sum(
        p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        for p in parameters
    )


def _describe(thing: object) -> str:
    return f"an object of type {type(thing).__name__}"

"""A copy of a module in double precision, free of everything that watches the original."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from gradwatch.explain.gradients.structures import is_continuous

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_NO_COPY = (
    "check_gradients works on a copy of the module in float64, and {kind} cannot be copied: "
    "{reason}. Write a __deepcopy__ for the part that refuses, or check a function of tensors."
)
_NO_DOUBLES = (
    "check_gradients compares in float64, which the device {device} does not have. Write "
    "check_gradients(model.cpu(), inputs) with the inputs on the CPU."
)
_SHARDED = (
    "check_gradients was given a DTensor, of which this rank holds a part. Call it with an "
    "unsharded copy of the model."
)


def float64_copy(module: nn.Module, *, widen: bool = True) -> nn.Module:
    """Copies a module with its parameters, buffers and tensor attributes in double precision.

    The copy has no ``.grad``, no hooks of tensors, and of the modules' hooks only those that torch
    hung there itself and that belong to what the module computes: ``weight_norm``, say. Tied
    weights stay tied. Data-parallel wrappers and that of ``torch.compile`` are left off.

    Args:
        module: The module, which stays as it is.
        widen: False for a copy in the precision that it has.

    Returns:
        The copy.

    Raises:
        TypeError: If it cannot be copied, is sharded, or is on a device without float64.
    """
    while isinstance(module, _WRAPPERS) or hasattr(module, "_orig_mod"):
        module = module.module if isinstance(module, _WRAPPERS) else module._orig_mod  # type: ignore[assignment]
    memo: dict[int, Any] = {}
    for part in module.modules():
        _replace_hooks(part, memo)
        _replace_tensors(part, memo, widen)
    try:
        return copy.deepcopy(module, memo)
    except (TypeError, RuntimeError, ValueError, AttributeError) as error:
        text = _NO_COPY.format(kind=type(module).__name__, reason=error)
        raise TypeError(text) from error


def widened(tensor: Tensor, *, widen: bool = True) -> Tensor:
    """Copies a tensor: real numbers as float64, complex ones as complex128, others as they are.

    Args:
        tensor: Any tensor.
        widen: False to keep its dtype.

    Returns:
        A dense, contiguous copy without a graph; integers, booleans and strings of bits too.

    Raises:
        TypeError: If it is sharded, or on a device without float64.
    """
    if hasattr(tensor, "to_local"):
        raise TypeError(_SHARDED)
    source = tensor.detach()
    if not is_continuous(source):
        return source.clone()
    if source.layout is not torch.strided:
        source = source.to_dense()
    if source.device.type == "mps" and widen:
        raise TypeError(_NO_DOUBLES.format(device=source.device))
    wide = torch.complex128 if source.is_complex() else torch.float64
    kept = source.to(wide if widen else source.dtype)
    return kept.clone(memory_format=torch.contiguous_format).as_subclass(Tensor)


def _replace_hooks(module: nn.Module, memo: dict[int, Any]) -> None:
    for name, hooks in vars(module).items():
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and isinstance(
            hooks, dict
        ):
            kept = OrderedDict((k, h) for k, h in hooks.items() if _is_of_torch(h))
            memo[id(hooks)] = copy.deepcopy(kept)


def _is_of_torch(hook: Any) -> bool:
    home = getattr(hook, "__module__", None) or type(hook).__module__
    return home.startswith("torch.nn.utils")


def _replace_tensors(module: nn.Module, memo: dict[int, Any], widen: bool) -> None:
    for owner in (module._parameters, module._buffers, vars(module)):
        for tensor in owner.values():
            if isinstance(tensor, Tensor) and id(tensor) not in memo:
                fresh = widened(tensor, widen=widen)
                if isinstance(tensor, nn.Parameter):
                    fresh = nn.Parameter(fresh, requires_grad=tensor.requires_grad)
                memo[id(tensor)] = fresh

"""What is checked: a function or a module, with its inputs, as something that can be repeated."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from gradwatch.explain.gradients.float64_copy import float64_copy, widened
from gradwatch.explain.gradients.repeatable import Leaf, Repeatable
from gradwatch.explain.gradients.structures import is_continuous, map_tensors, tensors_in
from gradwatch.observe.parameters import ParameterTable


def copied(function: Callable[..., Any], *, widen: bool) -> tuple[Callable[..., Any], Any]:
    """Copies the module that a function is, or is a method of.

    Args:
        function: Any function.
        widen: Whether the copy is in float64.

    Returns:
        The function to call, and the copied module; None if there is none.
    """
    if isinstance(function, nn.Module):
        module = float64_copy(function, widen=widen)
        return module, module
    if inspect.ismethod(function) and isinstance(function.__self__, nn.Module):
        module = float64_copy(function.__self__, widen=widen)
        return types.MethodType(function.__func__, module), module
    return function, None


def repeatable(
    function: Callable[..., Any],
    module: nn.Module | None,
    inputs: Any,
    *,
    only_marked: bool,
    widen: bool = True,
) -> Repeatable:
    """Makes a function repeatable, its inputs copied in float64.

    Args:
        function: What is called.
        module: The module whose parameters take part; None for none.
        inputs: A tensor, a tuple of arguments or a mapping of keyword arguments.
        only_marked: Whether inputs that do not require a gradient are constants. Otherwise they
            are only if another one requires it, and all are varied if none does.
        widen: False to keep the precision.

    Returns:
        The function with its inputs first and then the parameters that require a gradient.
    """
    chosen = only_marked or any(
        t.requires_grad for _, t in tensors_in(inputs, "") if is_continuous(t)
    )
    leaves: list[Leaf] = []

    def prepare(path: str, tensor: Tensor) -> Tensor:
        fresh = widened(tensor, widen=widen)
        if is_continuous(tensor) and tensor.numel() and (tensor.requires_grad or not chosen):
            leaves.append(Leaf.of(path, fresh.requires_grad_()))
        return fresh

    arguments = _arguments(map_tensors(inputs, prepare, "inputs"))
    if module is not None:
        table = ParameterTable.of(module)
        for name, tensor in zip(table.names, table.tensors, strict=True):
            if tensor.requires_grad and tensor.numel():
                leaves.append(Leaf.of(name, tensor))
    return Repeatable(function, arguments, leaves, module)


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}

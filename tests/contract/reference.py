"""What the numbers must be: computed apart, in float64, from copies."""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

WIDE = {torch.complex64: torch.complex128, torch.complex128: torch.complex128}


def widen(tensor: Tensor) -> Tensor:
    """Return a dense float64 (or complex128) copy, sparse duplicates summed."""
    tensor = tensor.detach()
    dense = tensor.to(torch.float64).to_dense() if tensor.is_sparse else tensor
    return dense.to(WIDE.get(dense.dtype, torch.float64), copy=True)


def norm(tensor: Tensor, p: float = 2.0) -> float:
    """Return the p-norm of all elements, in float64."""
    return float(torch.linalg.vector_norm(widen(tensor).abs(), p))


def total(norms: Mapping[str, float], p: float = 2.0) -> float:
    """Return the p-norm of per-parameter p-norms."""
    if math.isinf(p):
        return max(norms.values(), default=0.0)
    return sum(value**p for value in norms.values()) ** (1 / p)


def gradient_norms(parameters: Mapping[str, Tensor], p: float = 2.0) -> dict[str, float]:
    """Return the norm of every gradient that is there, by parameter name."""
    return {name: norm(t.grad, p) for name, t in parameters.items() if t.grad is not None}


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's parameters by name, each tied tensor once."""
    return dict(model.named_parameters())


def double_copy(model: nn.Module) -> nn.Module:
    """Return a deep copy with every parameter and buffer in double precision, gradients dropped."""
    twin = copy.deepcopy(model)
    for tensor in (*twin.parameters(), *twin.buffers()):
        tensor.grad = None
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.data = tensor.data.to(WIDE.get(tensor.dtype, torch.float64))
    return twin


def double_gradients(
    model: nn.Module, batches: list[tuple[Tensor, ...]], loss: Callable[[nn.Module, Any], Tensor]
) -> dict[str, float]:
    """Return the float64 gradients of the mean loss over `batches`, computed on a double copy of `model`."""
    twin = double_copy(model)
    for batch in batches:
        wide = tuple(t.double() if t.is_floating_point() else t for t in batch)
        (loss(twin, wide) / len(batches)).backward()
    return {name: widen(t.grad) for name, t in parameters_of(twin).items() if t.grad is not None}


def snapshot(model: nn.Module) -> list[Tensor]:
    """Return copies of all parameters and buffers."""
    return [t.detach().clone() for t in (*model.parameters(), *model.buffers())]


def identical(left: Any, right: Any) -> bool:
    """Return whether two nested states are equal bit for bit (NaN equals NaN, dtypes count)."""
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return _same_tensor(left, right)
    if type(left) is not type(right):
        return False
    if isinstance(left, Mapping):
        return left.keys() == right.keys() and all(identical(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(identical, left, right))
    return bool(left == right) or (left != left and right != right)


def _same_tensor(left: Any, right: Any) -> bool:
    if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
        return False
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    left, right = left.detach().to_dense(), right.detach().to_dense()
    return (
        left.reshape(-1)
        .contiguous()
        .view(torch.uint8)
        .equal(right.reshape(-1).contiguous().view(torch.uint8))
    )

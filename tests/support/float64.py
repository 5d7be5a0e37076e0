"""What the numbers must be, computed apart, in float64, from copies."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that may be split over ranks or sparse, whole and dense, in its own dtype."""
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    # Duplicates are added up in their own dtype, as the optimizer does.
    return tensor.coalesce().to_dense() if tensor.is_sparse else tensor


def widen(tensor: Tensor) -> Tensor:
    """Return a whole, dense copy in double precision of a tensor that may be split or sparse."""
    tensor = whole(tensor)
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64, copy=True)


def norm(tensor: Tensor, p: float = 2.0) -> float:
    """Return the p-norm of all elements."""
    return float(torch.linalg.vector_norm(widen(tensor), p))


def norms(tensors: Mapping[str, Tensor], p: float = 2.0) -> dict[str, float]:
    """Return the p-norm of each tensor, by name."""
    return {name: norm(tensor, p) for name, tensor in tensors.items()}


def total(norms: Mapping[str, float], p: float = 2.0) -> float:
    """Return the p-norm of all tensors together, given the p-norm of each."""
    each = torch.tensor(list(norms.values()), dtype=torch.float64)
    return float(torch.linalg.vector_norm(each, p)) if norms else 0.0


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients that are there, by parameter name, each tied tensor once."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def gradient_norms(parameters: Mapping[str, Tensor], p: float = 2.0) -> dict[str, float]:
    """Return the p-norm of every gradient that is there, by parameter name."""
    return {name: norm(t.grad, p) for name, t in parameters.items() if t.grad is not None}


def gradient_norm(model: nn.Module, p: float = 2.0) -> float:
    """Return the p-norm of all gradients of a model."""
    return total(norms(gradients(model), p), p)


def widen_module(model: nn.Module) -> nn.Module:
    """Put a model's parameters and buffers in double precision, in place, gradients dropped."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.grad = None
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.data = widen(tensor)
    return model

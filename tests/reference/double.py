"""The gradients of a model in float64, computed apart from the training that is watched."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tests.neutrality.models import make_batch, make_case

Gradients = dict[str, Tensor]


def widen(tensor: Tensor) -> Tensor:
    """Return a whole, dense copy in double precision of a tensor that may be split or sparse."""
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    if not tensor.is_sparse:
        return tensor.to(wide, copy=True)
    return tensor.coalesce().to(wide).to_dense()  # duplicates are added up as the optimizer does


def norms(gradients: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the L2 norm of each gradient."""
    return {name: float(torch.linalg.vector_norm(wide)) for name, wide in gradients.items()}


def total(norms: Mapping[str, float]) -> float:
    """Return the L2 norm of all gradients together."""
    return math.hypot(*norms.values())


class DoubleModel:
    """A model in float64 without dropout, that is given the weights of the watched one."""

    def __init__(self, name: str) -> None:
        self._name = name
        case = make_case(name, dropout=0.0)
        self._model, self._loss = case.model, case.loss
        for tensor in (*self._model.parameters(), *self._model.buffers()):
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.data = widen(tensor)

    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Copy the weights of the watched model, under its own names."""
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                parameter.copy_(weights[name])

    def gradients(self, batches: Iterable[tuple[int, int]], share: float) -> Gradients:
        """Return the sum over batches of the gradient of their loss, times `share`.

        Args:
            batches: Each the rank whose data it is, and its number.
            share: What each of them counts.
        """
        self._model.zero_grad()
        for rank, index in batches:
            batch = make_batch(self._name, rank, index)
            wide = tuple(t.double() if t.is_floating_point() else t for t in batch)
            (self._loss(self._model, wide) * share).backward()
        parameters = self._model.named_parameters()
        return {name: widen(p.grad) for name, p in parameters if p.grad is not None}

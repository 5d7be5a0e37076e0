"""The gradients of a model in float64, computed apart from the training that is watched."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tests.support.float64 import gradients, widen, widen_module
from tests.support.zoo import make_batch, make_case

Gradients = dict[str, Tensor]


class DoubleModel:
    """A model in float64 without dropout, that is given the weights of the watched one."""

    def __init__(self, name: str) -> None:
        self._name = name
        case = make_case(name, dropout=0.0)
        self._model, self._loss = case.model, case.loss
        widen_module(self._model)

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
        return {name: widen(grad) for name, grad in gradients(self._model).items()}

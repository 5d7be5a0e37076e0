"""A sketch of a gradient: a few of its elements, read without an operation of torch or a wait."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_TENSORS, _ELEMENTS = 4, 16
_C_TYPES = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}

Sketch = NDArray[np.float64]
"""Elements of a gradient: ``[n]`` with n of at most 64."""


class Sketcher:
    """Reads the same few elements of the gradients of some parameters, again and again."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        """Chooses the smallest of the parameters, and others from all over the model."""
        usable = [one for one in parameters if one.is_cpu and one.dtype in _C_TYPES and one.numel()]
        chosen = usable[:: 1 + len(usable) // (_TENSORS - 1)]
        if usable:
            chosen.append(min(usable, key=Tensor.numel))
        self._tensors = list({id(one): one for one in chosen}.values())

    def take(self) -> Sketch | None:
        """Returns the elements as they are now; None if a gradient cannot be read."""
        parts = []
        for tensor in self._tensors:
            gradient = tensor.grad
            if gradient is None or not _is_readable(gradient):
                return None
            parts.append(_first_of(gradient))
        return np.concatenate(parts, dtype=np.float64) if parts else None


def _first_of(gradient: Tensor) -> NDArray[Any]:
    if not gradient.is_contiguous():
        # flat reads these elements only, whatever the strides are.
        return gradient.numpy().flat[:_ELEMENTS]
    # Tensor.numpy() would start an operation of torch, in every backward.
    count = min(gradient.numel(), _ELEMENTS)
    memory = (_C_TYPES[gradient.dtype] * count).from_address(gradient.data_ptr())
    return np.array(memory)


def _is_readable(gradient: Tensor) -> bool:
    return (
        type(gradient) is Tensor
        and gradient.is_cpu
        and gradient.layout is torch.strided
        and gradient.dtype in _C_TYPES
        and not gradient.requires_grad
        and not gradient.is_neg()
    )

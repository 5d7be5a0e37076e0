"""Further statistics per parameter, for those who ask for them: pure functions of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradwatch.observe.norms import gradient_norms
from gradwatch.observe.values import gradient_values

Row = NDArray[np.floating[Any]]

GRADIENT_STATISTICS = ("max", "mean", "std", "zeros")
WEIGHT_STATISTICS = ("weight_norm", "update_ratio")
STATISTICS = ("norm", *GRADIENT_STATISTICS, *WEIGHT_STATISTICS)
"""Every statistic that ``watch(statistics=)`` knows; ``norm`` is always taken."""


def gradient_statistics(
    gradients: Sequence[Tensor], names: Sequence[str], scale: float
) -> dict[str, Row]:
    """Takes statistics of the elements of each gradient.

    Args:
        gradients: Tensors of any shape, real or complex, dense or sparse. The elements of a complex
            one are its real and imaginary parts, those of a sparse one its stored values.
        names: What to take: ``max`` (largest magnitude), ``mean``, ``std`` (population), ``zeros``
            (share of elements that are exactly zero).
        scale: What to multiply a gradient with to have true units.

    Returns:
        For each name a float array ``[len(gradients)]``.
    """
    values = [_elements(gradient) for gradient in gradients]
    units = {"zeros": 1.0}
    return {
        name: np.array([_STATISTICS[name](v) * units.get(name, scale) for v in values])
        for name in names
        if name in _STATISTICS
    }


def weight_norms(parameters: Sequence[Tensor]) -> Row:
    """Takes the L2 norm of each parameter.

    Args:
        parameters: Tensors of any shape.

    Returns:
        Float array ``[len(parameters)]``.
    """
    norms: Row = gradient_norms([p.detach() for p in parameters]).cpu().numpy()
    return norms


def update_ratios(before: Sequence[Tensor], after: Sequence[Tensor]) -> Row:
    """Takes the size of an update in relation to the weights that it changed.

    Args:
        before: Copies of the parameters before the step.
        after: The parameters after it.

    Returns:
        Float array ``[len(before)]``: the L2 norm of the change over that of the weights before;
        NaN for weights that were all zero.
    """
    changes = [new.detach() - old for new, old in zip(after, before, strict=True)]
    update = gradient_norms(changes).cpu().numpy()
    weight = gradient_norms(list(before)).cpu().numpy()
    ratio: Row = np.divide(update, weight, out=np.full_like(update, np.nan), where=weight > 0)
    return ratio


def _elements(gradient: Tensor) -> Tensor:
    values = gradient_values(gradient.detach())
    return torch.view_as_real(values) if values.is_complex() else values


def _std(values: Tensor) -> float:
    return float(torch.std(_wide(values), correction=0)) if values.numel() else 0.0


def _mean(values: Tensor) -> float:
    return float(_wide(values).mean()) if values.numel() else 0.0


def _max(values: Tensor) -> float:
    if not values.numel():
        return 0.0
    low, high = torch.aminmax(values)
    return float(torch.maximum(-low, high))


def _zeros(values: Tensor) -> float:
    return 1.0 - float(torch.count_nonzero(values)) / max(values.numel(), 1)


def _wide(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


_STATISTICS: dict[str, Callable[[Tensor], float]] = {
    "max": _max,
    "mean": _mean,
    "std": _std,
    "zeros": _zeros,
}

"""Further statistics per parameter, for those who ask for them: pure functions of tensors.

They are taken in two halves. What a device computes are rows that add up where several ranks hold
parts of a parameter (``max`` alone compares); what the host makes of them are the statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from gradwatch.observe.norms import gradient_norms
from gradwatch.observe.readings import Array
from gradwatch.observe.values import gradient_values

GRADIENT_STATISTICS = ("max", "mean", "std", "zeros")
WEIGHT_STATISTICS = ("weight_norm", "update_ratio")
STATISTICS = ("norm", *GRADIENT_STATISTICS, *WEIGHT_STATISTICS)
"""Every statistic that ``watch(statistics=)`` knows; ``norm`` is always taken."""

_ROWS_OF = {
    "max": ("max",),
    "mean": ("count", "sum"),
    "std": ("count", "sum", "sum_squared_over_count", "squared_deviations"),
    "zeros": ("count", "zeros"),
    "weight_norm": ("squared_weights",),
    "update_ratio": ("squared_weights", "squared_update"),
}


def gradient_rows(gradients: Sequence[Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Takes what statistics of the elements of each gradient are made of.

    Args:
        gradients: Tensors of any shape, real or complex, dense or sparse, or parts of such. The
            elements of a complex one are its real and imaginary parts, those of a sparse one its
            stored values.
        names: The statistics; others than ``GRADIENT_STATISTICS`` are passed over.

    Returns:
        Rows by name: tensors ``[len(gradients)]``, float64, on the device of the first gradient.
    """
    rows = {row for name in names if name in GRADIENT_STATISTICS for row in _ROWS_OF[name]}
    values = [_elements(gradient) for gradient in gradients]
    return {row: _row(_MEASURES[row], values) for row in sorted(rows)}


def weight_row(parameters: Sequence[Tensor]) -> Tensor:
    """Takes the squared L2 norm of each parameter, or of a part of each.

    Args:
        parameters: Tensors of any shape.

    Returns:
        Tensor ``[len(parameters)]``, float64.
    """
    return gradient_norms([p.detach() for p in parameters]).double().square()


def update_row(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """Takes the squared L2 norm of the change of each parameter, or of a part of each.

    Args:
        before: Copies of the parameters before the step.
        after: The parameters after it.

    Returns:
        Tensor ``[len(before)]``, float64.
    """
    return weight_row([new.detach() - old for new, old in zip(after, before, strict=True)])


def statistics_of(names: Sequence[str], rows: Mapping[str, Array], unit: float) -> dict[str, Array]:
    """Makes the statistics of rows that have been added up.

    Args:
        names: ``max`` (largest magnitude), ``mean``, ``std`` (population), ``zeros`` (share of
            elements that are exactly zero), ``weight_norm`` (L2, before the step),
            ``update_ratio`` (L2 norm of the update over that of the weights before, NaN where
            they were all zero).
        rows: By name, float arrays ``[n]``.
        unit: What to divide a gradient by to have true units.

    Returns:
        For each name whose rows are there a float array ``[n]``.
    """
    there = [name for name in names if all(row in rows for row in _ROWS_OF.get(name, ("",)))]
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        return {name: _FORMULAS[name](rows, unit) for name in there}


def _row(measure: Callable[[Tensor], Tensor], values: list[Tensor]) -> Tensor:
    if not values:
        return torch.zeros(0, dtype=torch.float64)
    numbers = [measure(value).double() for value in values]
    return torch.stack([one.to(numbers[0].device) for one in numbers])


def _elements(gradient: Tensor) -> Tensor:
    values = gradient_values(gradient.detach())
    values = torch.view_as_real(values) if values.is_complex() else values
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _count(values: Tensor) -> Tensor:
    return torch.full((), values.numel(), dtype=torch.float64, device=values.device)


def _max(values: Tensor) -> Tensor:
    if not values.numel():
        return values.new_zeros(())
    low, high = torch.aminmax(values)
    return torch.maximum(-low, high)


def _mean(values: Tensor) -> Tensor:
    return values.mean().double() if values.numel() else values.new_zeros(())


def _sum(values: Tensor) -> Tensor:
    return _mean(values) * values.numel()


def _sum_squared_over_count(values: Tensor) -> Tensor:
    return _mean(values).square() * values.numel()


def _squared_deviations(values: Tensor) -> Tensor:
    if not values.numel():
        return values.new_zeros(())
    return torch.var(values, correction=0).double() * values.numel()


def _zeros(values: Tensor) -> Tensor:
    return values.numel() - torch.count_nonzero(values)


_MEASURES: dict[str, Callable[[Tensor], Tensor]] = {
    "count": _count,
    "max": _max,
    "sum": _sum,
    "sum_squared_over_count": _sum_squared_over_count,
    "squared_deviations": _squared_deviations,
    "zeros": _zeros,
}


def _mean_of(rows: Mapping[str, Array], unit: float) -> Array:
    mean: Array = rows["sum"] / np.maximum(rows["count"], 1) / unit
    return mean


def _std_of(rows: Mapping[str, Array], unit: float) -> Array:
    """Adds up the deviations within parts and between them (Chan, Golub, LeVeque 1983)."""
    count = np.maximum(rows["count"], 1)
    between = np.maximum(rows["sum_squared_over_count"] - rows["sum"] ** 2 / count, 0)
    std: Array = np.sqrt((rows["squared_deviations"] + between) / count) / unit
    return std


def _update_ratio_of(rows: Mapping[str, Array], unit: float) -> Array:
    ratio: Array = np.sqrt(rows["squared_update"] / rows["squared_weights"])
    return np.where(rows["squared_weights"] > 0, ratio, np.nan)


_FORMULAS: dict[str, Callable[[Mapping[str, Array], float], Array]] = {
    "max": lambda rows, unit: rows["max"] / unit,
    "mean": _mean_of,
    "std": _std_of,
    "zeros": lambda rows, unit: rows["zeros"] / np.maximum(rows["count"], 1),
    "weight_norm": lambda rows, unit: np.sqrt(rows["squared_weights"]),
    "update_ratio": _update_ratio_of,
}

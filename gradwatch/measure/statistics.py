"""Statistics per parameter besides the norm, taken at every so many steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from gradwatch.measure.deferred import Array, Deferred, FloatOrDeferred, resolve
from gradwatch.measure.norms import gradient_norms, gradient_values
from gradwatch.measure.parameters import local_part
from gradwatch.measure.sharded import PackedAllReduce, Shards

GRADIENT_STATISTICS = ("max", "mean", "std", "zeros")
WEIGHT_STATISTICS = ("weight_norm", "update_ratio")
STATISTICS = ("norm", *GRADIENT_STATISTICS, *WEIGHT_STATISTICS)
"""Every statistic that ``watch(statistics=)`` knows; ``norm`` is always taken."""

# Of each statistic the rows that add up over the parts of a gradient, so that ranks which hold a
# part each can make it together. A sum of squares would do for ``std`` too, but it cancels where
# the mean is large; see _std_of().
_ROWS_OF = {
    "max": ("max",),
    "mean": ("count", "sum"),
    "std": ("count", "sum", "sum_squared_over_count", "squared_deviations"),
    "zeros": ("count", "zeros"),
    "weight_norm": ("squared_weights",),
    "update_ratio": ("squared_weights", "squared_update"),
}


def gradient_rows(gradients: Sequence[Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Computes what statistics of the elements of each gradient are made of.

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
    """Computes the squared L2 norm of each parameter, or of a part: ``[n]``, float64."""
    return gradient_norms([p.detach() for p in parameters]).double().square()


def update_row(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """Computes the squared L2 norm of the change of each parameter, or of a part of each.

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
    # An empty part has no mean and no largest element; it counts as 0.
    numbers = [(measure(v) if v.numel() else v.new_zeros(())).double() for v in values]
    return torch.stack([one.to(numbers[0].device) for one in numbers])


def _elements(gradient: Tensor) -> Tensor:
    values = gradient_values(gradient.detach())
    values = torch.view_as_real(values) if values.is_complex() else values
    # Every result would be rounded to their 8 or 11 bits, and those of float16 overflow.
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _max(values: Tensor) -> Tensor:
    low, high = torch.aminmax(values)  # on a CPU ten times as fast as a norm of p = inf
    return torch.maximum(-low, high)


_MEASURES: dict[str, Callable[[Tensor], Tensor]] = {
    "count": lambda v: torch.full((), v.numel(), dtype=torch.float64, device=v.device),
    "max": _max,
    "sum": lambda v: v.mean().double() * v.numel(),
    "sum_squared_over_count": lambda v: v.mean().double().square() * v.numel(),
    "squared_deviations": lambda v: torch.var(v, correction=0).double() * v.numel(),
    "zeros": lambda v: v.numel() - torch.count_nonzero(v),
}


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
    "mean": lambda rows, unit: rows["sum"] / np.maximum(rows["count"], 1) / unit,
    "std": _std_of,
    "zeros": lambda rows, unit: rows["zeros"] / np.maximum(rows["count"], 1),
    "weight_norm": lambda rows, unit: np.sqrt(rows["squared_weights"]),
    "update_ratio": _update_ratio_of,
}


@dataclass(frozen=True, slots=True)
class StatisticsSample:
    """The statistics of one step, whose numbers may be on their way from the device.

    Attributes:
        names: The statistics.
        columns: Number of watched parameters.
        parts: Indices and rows, those of gradients and those of weights.
        unit: The loss scale that the gradients carried.
    """

    names: Sequence[str] = ()
    columns: int = 0
    parts: Sequence[tuple[Sequence[int], dict[str, Deferred]]] = ()
    unit: FloatOrDeferred = 1.0

    def deferred(self) -> list[Deferred]:
        """Lists what must be read before the rows can be made."""
        unit = [self.unit] if isinstance(self.unit, Deferred) else []
        return [*unit, *(row for _, rows in self.parts for row in rows.values())]

    def rows(self) -> dict[str, Array]:
        """Makes the statistics: rows over all columns, NaN where there is no value."""
        made: dict[str, Array] = {}
        for indices, deferred in self.parts:
            rows = {name: row.array() for name, row in deferred.items()}
            for name, values in statistics_of(self.names, rows, resolve(self.unit)).items():
                made[name] = np.full(self.columns, np.nan)
                made[name][list(indices)] = values
        return made


NO_SAMPLE = StatisticsSample()


@dataclass(slots=True)
class _Rows:
    """Rows ``[len(indices)]`` by name, and their slots in the all-reduce between ranks."""

    indices: Sequence[int] = ()
    rows: dict[str, Tensor] = field(default_factory=dict)
    slots: dict[str, int] = field(default_factory=dict)


class StatisticsSampler:
    """The further statistics of one optimizer's parameters.

    ``update_ratio`` copies the weights before a sampled step; nothing else is kept.
    """

    def __init__(
        self, names: Sequence[str], every: int, columns: int, shards: Shards | None = None
    ) -> None:
        """Starts with no sample.

        Args:
            names: Statistics to take; ``norm`` is not among its tasks.
            every: Take them at every so many steps.
            columns: Number of watched parameters.
            shards: Knows which parameters this rank holds a part of; None where all are whole.
        """
        self._names = [name for name in names if name != "norm"]
        self._of_gradients = [name for name in self._names if name in GRADIENT_STATISTICS]
        self._of_weights = len(self._of_gradients) < len(self._names)
        self._every = every
        self._columns = columns
        self._shards = shards
        self._forget()

    @classmethod
    def of(
        cls, names: Sequence[str], every: int, columns: int, shards: Shards | None
    ) -> StatisticsSampler | None:
        """Returns a sampler; None where no more than the norm is wanted."""
        return cls(names, every, columns, shards) if any(name != "norm" for name in names) else None

    def _forget(self) -> None:
        self._gradients, self._weights = _Rows(), _Rows()
        self._weights_before: list[Tensor] = []
        self._packed: PackedAllReduce | None = None

    def due(self, step: int) -> bool:
        """Tells whether statistics are to be taken at a step, counted from 1."""
        return bool(self._names) and (step - 1) % self._every == 0

    def measure_gradients(self, indices: Sequence[int], gradients: Sequence[Tensor]) -> None:
        """Measures gradients before the clip, of sharded ones the parts of this rank."""
        if self._of_gradients:
            self._gradients = _Rows(indices, gradient_rows(gradients, self._of_gradients))

    def measure_weights(self, indices: Sequence[int], parameters: Sequence[Tensor]) -> None:
        """Measures parameters before the step."""
        if self._of_weights:
            parts = list(map(local_part, parameters))
            self._weights = _Rows(indices, {"squared_weights": weight_row(parts)})

    def add_to(self, packed: PackedAllReduce) -> None:
        """Adds the rows of sharded parameters to the all-reduce of the norms."""
        # Anew at each call: a closure that is evaluated several times reduces as often.
        for part in (self._gradients, self._weights):
            for name, values in part.rows.items():
                row = packed.shards.full_row(part.indices, values)
                part.slots[name] = packed.add_gather(row) if name == "max" else packed.add_sum(row)
        self._packed = packed

    def before_step(self, parameters: Sequence[Tensor]) -> None:
        """Copies the weights that a step is about to change, where their update is asked for."""
        if "update_ratio" in self._names:
            self._weights_before = [torch.clone(local_part(p.detach())) for p in parameters]

    def after_step(
        self, indices: Sequence[int], parameters: Sequence[Tensor], unit: FloatOrDeferred
    ) -> StatisticsSample:
        """Measures the update, and returns everything measured for this step.

        Args:
            indices: Columns of the parameters.
            parameters: The parameters after the step.
            unit: The loss scale that the gradients carried when they were measured.
        """
        if self._packed is not None:
            for part in (self._gradients, self._weights):
                for name, slot in part.slots.items():
                    part.rows[name] = _reduced_row(self._packed, part.indices, name, slot)
        if self._weights_before:
            update = update_row(self._weights_before, list(map(local_part, parameters)))
            self._weights.rows["squared_update"] = self._summed(indices, update)
        parts = [
            (part.indices, {name: Deferred(row) for name, row in part.rows.items()})
            for part in (self._gradients, self._weights)
            if part.rows
        ]
        self._forget()
        return StatisticsSample(self._names, self._columns, parts, unit)

    def _summed(self, indices: Sequence[int], row: Tensor) -> Tensor:
        """Sums the row of an update over the ranks, in an all-reduce of its own after the step."""
        if self._shards is None:
            return row
        packed = PackedAllReduce(self._shards, row.device)
        slot = packed.add_sum(self._shards.full_row(indices, row))
        packed.run()
        return _reduced_row(packed, indices, "squared_update", slot)


def _reduced_row(packed: PackedAllReduce, indices: Sequence[int], name: str, slot: int) -> Tensor:
    row = packed.gathered[slot].amax(0) if name == "max" else packed.sums[slot]
    return row[packed.shards.index_tensor(indices, row.device)]

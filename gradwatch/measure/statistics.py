"""Statistics per parameter besides the norm, taken at every so many steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradwatch.measure.deferred import Array, Deferred, FloatOrDeferred, resolve
from gradwatch.measure.norms import gradient_norms, gradient_values
from gradwatch.measure.sharded import Exchange, Shards, local_part

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


@dataclass(slots=True)
class StatisticRows:
    """Rows over some of the parameters.

    Attributes:
        indices: The parameters.
        rows: By name, tensors ``[len(indices)]``.
    """

    indices: Sequence[int]
    rows: dict[str, Tensor]


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

    def readings(self) -> list[Deferred]:
        """Lists what must be read before the rows can be made."""
        unit = [self.unit] if isinstance(self.unit, Deferred) else []
        return [*unit, *(reading for _, rows in self.parts for reading in rows.values())]

    def rows(self) -> dict[str, Array]:
        """Makes the statistics: rows over all columns, NaN where there is no value."""
        made: dict[str, Array] = {}
        for indices, readings in self.parts:
            rows = {name: reading.array() for name, reading in readings.items()}
            for name, values in statistics_of(self.names, rows, resolve(self.unit)).items():
                made[name] = np.full(self.columns, np.nan)
                made[name][list(indices)] = values
        return made


NO_SAMPLE = StatisticsSample()


class StatisticsSampler:
    """The further statistics of one optimizer's parameters.

    ``update_ratio`` copies the weights before a sampled step; nothing else is kept.
    """

    def __init__(
        self, names: Sequence[str], every: int, columns: int, shards: Shards | None = None
    ) -> None:
        """Takes note of what is wanted.

        Args:
            names: Statistics to take; ``norm`` is none of its business.
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
        self._gradients, self._weights = StatisticRows((), {}), StatisticRows((), {})
        self._copies: list[Tensor] = []
        self._exchange: Exchange | None = None
        self._tickets: list[dict[str, int]] = []

    @classmethod
    def of(
        cls, names: Sequence[str], every: int, columns: int, shards: Shards | None
    ) -> StatisticsSampler | None:
        """Returns a sampler; None where no more than the norm is wanted."""
        return cls(names, every, columns, shards) if any(name != "norm" for name in names) else None

    def due(self, step: int) -> bool:
        """Tells whether statistics are to be taken at a step, counted from 1."""
        return bool(self._names) and (step - 1) % self._every == 0

    def see_gradients(self, indices: Sequence[int], gradients: Sequence[Tensor]) -> None:
        """Takes the statistics of gradients.

        Args:
            indices: Columns of the gradients.
            gradients: The gradients before the clip, of sharded ones the parts of this rank.
        """
        if self._of_gradients:
            self._gradients = StatisticRows(indices, gradient_rows(gradients, self._of_gradients))

    def see_weights(self, indices: Sequence[int], parameters: Sequence[Tensor]) -> None:
        """Takes the statistics of weights.

        Args:
            indices: Columns of the parameters.
            parameters: The parameters before the step.
        """
        if self._of_weights:
            parts = list(map(local_part, parameters))
            self._weights = StatisticRows(indices, {"squared_weights": weight_row(parts)})

    def exchange(self, exchange: Exchange) -> None:
        """Lets the rows of sharded parameters ride along with an exchange between ranks."""
        # Anew at each call: a closure that is evaluated several times exchanges as often.
        self._tickets = [
            {name: self._enter(exchange, part, name) for name in part.rows}
            for part in (self._gradients, self._weights)
        ]
        self._exchange = exchange

    def before_step(self, parameters: Sequence[Tensor]) -> None:
        """Copies the weights that a step is about to change, where their update is asked for."""
        if "update_ratio" in self._names:
            self._copies = [torch.clone(local_part(p.detach())) for p in parameters]

    def after_step(
        self, indices: Sequence[int], parameters: Sequence[Tensor], unit: FloatOrDeferred
    ) -> StatisticsSample:
        """Takes the statistics of the update.

        Args:
            indices: Columns of the parameters.
            parameters: The parameters after the step.
            unit: The loss scale that the gradients carried when they were seen.

        Returns:
            Everything taken for this step.
        """
        if self._exchange is not None:
            for part, tickets in zip((self._gradients, self._weights), self._tickets, strict=True):
                for name, ticket in tickets.items():
                    part.rows[name] = self._result(self._exchange, part, name, ticket)
        if self._copies:
            now = list(map(local_part, parameters))
            self._weights.rows["squared_update"] = self._whole(
                indices, update_row(self._copies, now)
            )
        parts = [
            (part.indices, {name: Deferred(row) for name, row in part.rows.items()})
            for part in (self._gradients, self._weights)
            if part.rows
        ]
        self._forget()
        return StatisticsSample(self._names, self._columns, parts, unit)

    def _forget(self) -> None:
        self._gradients, self._weights = StatisticRows((), {}), StatisticRows((), {})
        self._copies, self._exchange, self._tickets = [], None, []

    def _enter(self, exchange: Exchange, part: StatisticRows, name: str) -> int:
        row = exchange.shards.spread(part.indices, part.rows[name])
        return exchange.tell(row) if name == "max" else exchange.add_up(row)

    def _result(self, exchange: Exchange, part: StatisticRows, name: str, ticket: int) -> Tensor:
        row = exchange.told(ticket).amax(0) if name == "max" else exchange.total(ticket)
        return row[exchange.shards.places(part.indices, row.device)]

    def _whole(self, indices: Sequence[int], row: Tensor) -> Tensor:
        """Adds the row of an update up over the ranks, which can be done only after the step."""
        if self._shards is None:
            return row
        exchange = Exchange(self._shards, row.device)
        ticket = exchange.add_up(self._shards.spread(indices, row))
        exchange.run()
        return exchange.total(ticket)[self._shards.places(indices, row.device)]

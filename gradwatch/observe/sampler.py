"""StatisticsSampler: takes the costly statistics, at every so many steps only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradwatch.observe.readings import Array, Number, Reading, number
from gradwatch.observe.shards import Exchange, Shards, local_part
from gradwatch.observe.statistics import (
    GRADIENT_STATISTICS,
    gradient_rows,
    statistics_of,
    update_row,
    weight_row,
)


@dataclass(slots=True)
class Part:
    """Rows over some of the parameters.

    Attributes:
        indices: The parameters.
        rows: By name, tensors ``[len(indices)]``.
    """

    indices: Sequence[int]
    rows: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Sample:
    """The statistics of one step, whose numbers may be on their way from the device.

    Attributes:
        names: The statistics.
        columns: Number of watched parameters.
        parts: Indices and rows, those of gradients and those of weights.
        unit: The loss scale that the gradients carried.
    """

    names: Sequence[str] = ()
    columns: int = 0
    parts: Sequence[tuple[Sequence[int], dict[str, Reading]]] = ()
    unit: Number = 1.0

    def readings(self) -> list[Reading]:
        """Lists what must be read before the rows can be made."""
        unit = [self.unit] if isinstance(self.unit, Reading) else []
        return [*unit, *(reading for _, rows in self.parts for reading in rows.values())]

    def rows(self) -> dict[str, Array]:
        """Makes the statistics: rows over all columns, NaN where there is no value."""
        made: dict[str, Array] = {}
        for indices, readings in self.parts:
            rows = {name: reading.array() for name, reading in readings.items()}
            for name, values in statistics_of(self.names, rows, number(self.unit)).items():
                made[name] = np.full(self.columns, np.nan)
                made[name][list(indices)] = values
        return made


NO_SAMPLE = Sample()


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
        self._gradients, self._weights = Part((), {}), Part((), {})
        self._copies: list[Tensor] = []
        self._exchange: Exchange | None = None
        self._tickets: list[dict[str, int]] = []

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
            self._gradients = Part(indices, gradient_rows(gradients, self._of_gradients))

    def see_weights(self, indices: Sequence[int], parameters: Sequence[Tensor]) -> None:
        """Takes the statistics of weights.

        Args:
            indices: Columns of the parameters.
            parameters: The parameters before the step.
        """
        if self._of_weights:
            parts = list(map(local_part, parameters))
            self._weights = Part(indices, {"squared_weights": weight_row(parts)})

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
        self, indices: Sequence[int], parameters: Sequence[Tensor], unit: Number
    ) -> Sample:
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
            (part.indices, {name: Reading(row) for name, row in part.rows.items()})
            for part in (self._gradients, self._weights)
            if part.rows
        ]
        self._forget()
        return Sample(self._names, self._columns, parts, unit)

    def _forget(self) -> None:
        self._gradients, self._weights = Part((), {}), Part((), {})
        self._copies, self._exchange, self._tickets = [], None, []

    def _enter(self, exchange: Exchange, part: Part, name: str) -> int:
        row = exchange.shards.spread(part.indices, part.rows[name])
        return exchange.tell(row) if name == "max" else exchange.add_up(row)

    def _result(self, exchange: Exchange, part: Part, name: str, ticket: int) -> Tensor:
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

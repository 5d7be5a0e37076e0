"""StatisticsSampler: takes the costly statistics, at every so many steps only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradwatch.observe.statistics import (
    GRADIENT_STATISTICS,
    Row,
    gradient_statistics,
    update_ratios,
    weight_norms,
)


class StatisticsSampler:
    """The further statistics of one optimizer's parameters, as rows over all watched ones.

    ``update_ratio`` copies the weights before a sampled step; nothing else is kept.
    """

    def __init__(self, names: Sequence[str], every: int, columns: int) -> None:
        """Takes note of what is wanted.

        Args:
            names: Statistics to take; ``norm`` is none of its business.
            every: Take them at every so many steps.
            columns: Number of watched parameters.
        """
        self._names = [name for name in names if name != "norm"]
        self._of_gradients = [name for name in self._names if name in GRADIENT_STATISTICS]
        self._every = every
        self._columns = columns
        self._rows: dict[str, Row] = {}
        self._weights: list[Tensor] = []

    def due(self, step: int) -> bool:
        """Tells whether statistics are to be taken at a step, counted from 1."""
        return bool(self._names) and (step - 1) % self._every == 0

    def see_gradients(
        self, indices: Sequence[int], gradients: Sequence[Tensor], scale: float
    ) -> None:
        """Takes the statistics of gradients.

        Args:
            indices: Columns of the gradients.
            gradients: The gradients before the clip.
            scale: What to multiply them with to have true units.
        """
        if self._of_gradients:
            taken = gradient_statistics(gradients, self._of_gradients, scale)
            self._rows.update({name: self._row(indices, v) for name, v in taken.items()})

    def before_step(self, indices: Sequence[int], parameters: Sequence[Tensor]) -> None:
        """Takes the statistics of weights.

        Args:
            indices: Columns of the parameters.
            parameters: The parameters before the step.
        """
        if "weight_norm" in self._names:
            self._rows["weight_norm"] = self._row(indices, weight_norms(parameters))
        if "update_ratio" in self._names:
            self._weights = [torch.clone(parameter.detach()) for parameter in parameters]

    def after_step(self, indices: Sequence[int], parameters: Sequence[Tensor]) -> dict[str, Row]:
        """Takes the statistics of the update.

        Args:
            indices: Columns of the parameters.
            parameters: The parameters after the step.

        Returns:
            Everything taken for this step: rows over all columns, NaN where there is no value.
        """
        if self._weights:
            self._rows["update_ratio"] = self._row(
                indices, update_ratios(self._weights, parameters)
            )
        rows, self._rows, self._weights = self._rows, {}, []
        return rows

    def _row(self, indices: Sequence[int], values: Row) -> Row:
        row = np.full(self._columns, np.nan)
        row[list(indices)] = values
        return row

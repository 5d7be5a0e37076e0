"""BadWeights: the weights that are NaN or Inf, apart from those that have done no harm so far."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradwatch.measure.deferred import is_at_hand
from gradwatch.measure.norms import LateCheck, Measurement, measure
from gradwatch.measure.parameters import readable_part

_MEASURABLE = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex64, torch.complex128),
}


class BadWeights:
    """Looks for NaN and Inf in weights, to tell whether they were there before the gradients.

    Attributes:
        unknown: Whether :meth:`note_good` was never called.
        weights: All watched parameters.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        """Reads nothing yet."""
        self.unknown = True
        self.weights = weights
        self._harmless: set[int] = set()

    def note_good(self) -> None:
        """Notes the weights of a backward that gave finite gradients.

        What is bad in them does no harm: a mask of minus infinity, a row that nothing looks up.
        Nothing is noted if other weights than those of the backward are on a device.
        """
        self.unknown = False
        if all(map(is_at_hand, self.weights)):
            self._harmless = set(self.found())

    def found(self) -> list[int]:
        """Lists the indices of the weights that are bad and may do harm; waits for a device."""
        weights = self._values()
        norms = measure(list(weights), list(weights.values()), 2.0)
        bad = LateCheck(0, norms, ()).nonfinite(list(weights.values()))
        return [one.index for one in bad if one.index not in self._harmless]

    def measured(self) -> Measurement:
        """Measures the weights; never waits."""
        weights = self._values()
        return measure(list(weights), list(weights.values()), 2.0)

    @staticmethod
    def with_nan(measured: Measurement) -> list[int]:
        """Lists the indices of the weights that hold a NaN; waits for the norms.

        Where no good backward was noted, as on a device, nothing tells whether an Inf does harm: a
        mask may hold it on purpose.
        """
        norms = measured.norms.array()
        return [measured.indices[i] for i in np.flatnonzero(np.isnan(norms)).tolist()]

    def _values(self) -> dict[int, Tensor]:
        return {
            index: readable_part(tensor.detach())
            for index, tensor in enumerate(self.weights)
            if tensor.dtype in _MEASURABLE and not tensor.is_meta
        }

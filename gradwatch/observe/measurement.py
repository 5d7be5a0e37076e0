"""Measurement: the norms of one set of gradients at one moment, and where they are bad."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradwatch.observe.norms import gradient_norms, total_norm, wide_norms
from gradwatch.observe.readings import Reading, is_at_hand
from gradwatch.observe.values import gradient_values


class Measurement(NamedTuple):
    """Norms of some gradients, taken in one batched pass.

    Attributes:
        indices: Index in the parameter table of each gradient, ascending.
        norms: Reading ``[len(indices)]``: the norm of each.
        total: Reading ``[]``: the norm of all together.
        overflowed: Whether the elements are finite but their float32 norm was not; the numbers
            are then float64 ones. Found out only where they are at hand.
    """

    indices: Sequence[int]
    norms: Reading
    total: Reading
    overflowed: bool = False

    @property
    def finite(self) -> bool:
        """Whether the total norm is a finite number."""
        return math.isfinite(self.total.value())

    def nonfinite_indices(self) -> list[int]:
        """Lists the indices whose norm is NaN or Inf."""
        return [self.indices[i] for i in np.flatnonzero(~np.isfinite(self.norms.array())).tolist()]

    def subset(self, indices: Sequence[int], norm_type: float) -> Measurement:
        """Keeps some of the parameters.

        Args:
            indices: Those to keep, ascending.
            norm_type: The p of the norms.

        Returns:
            The measurement that a pass over those alone would have given.
        """
        wanted = set(indices)
        keep = [i for i, index in enumerate(self.indices) if index in wanted]
        norms = self.norms.tensor[keep]
        total = total_norm(norms, norm_type)
        kept = [self.indices[i] for i in keep]
        return Measurement(kept, Reading(norms), Reading(total), self.overflowed)


def measure(
    indices: Sequence[int],
    gradients: list[Tensor],
    norm_type: float,
    dtype: torch.dtype | None = None,
) -> Measurement:
    """Measures gradients in one batched pass.

    Args:
        indices: Index in the parameter table of each gradient, ascending.
        gradients: The gradients.
        norm_type: The p of the norm, positive or ``math.inf``.
        dtype: As for :func:`~gradwatch.observe.norms.gradient_norms`.

    Returns:
        The norms. Where the float32 norm of finite gradients overflows they are taken once more
        in float64, so that the true number stands there and a clip can still work with it; not so
        on an accelerator, where finding out would wait for it.
    """
    norms = gradient_norms(gradients, norm_type, dtype)
    total = total_norm(norms, norm_type)
    value = total.item() if is_at_hand(total) else None
    if value is None or math.isfinite(value) or not all(map(_all_finite, gradients)):
        return Measurement(indices, Reading(norms), Reading(total, value))
    norms = wide_norms(gradients, norm_type)
    total = total_norm(norms, norm_type)
    return Measurement(indices, Reading(norms), Reading(total), overflowed=True)


def _all_finite(gradient: Tensor) -> bool:
    return bool(torch.isfinite(gradient_values(gradient)).all())

"""Counting what is not a number: run only when a norm has told that something is wrong."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gradwatch.observe.values import gradient_values


class NonFiniteCount(NamedTuple):
    """How many elements of a gradient are NaN and Inf; a complex one with both is a NaN."""

    nan: int
    inf: int

    def __bool__(self) -> bool:
        return self.nan > 0 or self.inf > 0


def count_nonfinite(gradient: Tensor) -> NonFiniteCount:
    """Counts the bad elements of a gradient.

    Args:
        gradient: A tensor of any shape, floating or complex dtype, dense or sparse.

    Returns:
        The exact counts of NaN and of Inf elements.
    """
    values = gradient_values(gradient)
    nan = torch.isnan(values)
    inf = torch.isinf(values) & ~nan
    return NonFiniteCount(int(nan.sum()), int(inf.sum()))

"""The weight of a micro-batch, checked without a wait for a device."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from gradwatch.control.places import exact_dtype
from gradwatch.observe.readings import Number, is_at_hand, reading_of

WEIGHT = (
    "watcher.backward(weight=) must be a finite number of at least 0, or a tensor of one, got "
    "{weight!r}. Pass the number of examples, or tokens, that the loss is the mean of."
)


def checked_weight(weight: float | Tensor) -> Number:
    """Checks the weight that somebody gave.

    Args:
        weight: A number, or a tensor of one number on any device.

    Raises:
        TypeError: If it is something else.
        ValueError: If it is negative or not finite; on a device nobody looks.
    """
    if isinstance(weight, Tensor):
        if weight.numel() != 1 or weight.is_complex() or weight.dtype == torch.bool:
            raise TypeError(WEIGHT.format(weight=weight))
        if not is_at_hand(weight):  # to look at it would wait for the device
            # A quotient of integers would be of the default dtype, which is float32.
            return reading_of(weight.reshape(()).to(exact_dtype(weight.device)))
        weight = weight.item()
    if isinstance(weight, bool) or not isinstance(weight, Real):  # of NumPy as well
        raise TypeError(WEIGHT.format(weight=weight))
    try:
        number = float(weight)
    except OverflowError:
        number = math.inf
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(WEIGHT.format(weight=weight))
    return number

"""Changing gradients in place: the only place where gradwatch writes into a tensor of the user."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from gradwatch.measure.deferred import is_at_hand

_dtype, _layout = attrgetter("dtype"), attrgetter("layout")
_EXACT = {torch.float32, torch.float64}


def scale_(gradients: list[Tensor], coefficient: float | Tensor) -> None:
    """Multiplies every gradient, dense or sparse, with one number, in place.

    Args:
        gradients: Tensors of any shape and dtype.
        coefficient: The factor, a number or a tensor ``[]``; one that a float32 holds exactly
            gives the bits that ``torch.nn.utils.clip_grad_norm_`` gives.
    """
    dense = gradients
    # Hundreds of tensors, and nearly always all dense: one set is made faster than a list is.
    if set(map(_layout, gradients)) != {torch.strided}:
        dense = [gradient for gradient in gradients if gradient.layout is torch.strided]
    dtypes = set(map(_dtype, dense))
    if isinstance(coefficient, Tensor) and not dtypes <= _EXACT and is_at_hand(coefficient):
        # A tensor is the faster factor, but would be rounded to a half-precision dtype.
        coefficient = coefficient.item()
    if dense:
        torch._foreach_mul_(dense, coefficient)
    if dense is gradients:
        return
    for gradient in gradients:
        if gradient.layout is not torch.strided:
            gradient.mul_(coefficient)


def scale_each_(gradients: list[Tensor], coefficients: Tensor) -> None:
    """Multiplies every gradient, dense or sparse, with its own of the coefficients ``[n]``."""
    if not is_at_hand(coefficients):
        torch._foreach_mul_(gradients, list(coefficients.to(gradients[0].dtype).unbind()))
        return
    # On the host most factors are known to be 1, and their gradients need no pass over memory.
    for gradient, factor in zip(gradients, coefficients.tolist(), strict=True):
        if factor != 1.0:
            gradient.mul_(factor)


def clamp_(gradients: Sequence[Tensor], limit: float) -> None:
    """Limits every element of every gradient to ``[-limit, limit]``, in place; NaN stays NaN.

    Raises:
        TypeError: If a gradient is complex: its elements have no order.
    """
    # All are looked at before any is changed: an error leaves the gradients as they were.
    for gradient in gradients:
        if gradient.is_complex():
            raise TypeError("ClipByValue cannot limit a complex gradient; use ClipByNorm.")
    dense = [gradient for gradient in gradients if gradient.layout is torch.strided]
    if dense:
        torch._foreach_clamp_min_(dense, -limit)
        torch._foreach_clamp_max_(dense, limit)
    for gradient in gradients:
        if gradient.layout is not torch.strided:
            _clamp_sparse_(gradient, limit)


def _clamp_sparse_(gradient: Tensor, limit: float) -> None:
    # Duplicate indices add up, so the limit is for their sums.
    coalesced = gradient.coalesce()
    coalesced.values().clamp_(-limit, limit)
    if coalesced is not gradient:
        gradient.copy_(coalesced)

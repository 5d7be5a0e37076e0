"""Functions that scale or clamp many gradients in place."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from gradwatch.measure.deferred import is_at_hand

_dtype, _layout = attrgetter("dtype"), attrgetter("layout")
_EXACT = {torch.float32, torch.float64}


def scale_(gradients: list[Tensor], coefficient: float | Tensor) -> None:
    """Multiplies every gradient, dense or sparse, by one number, in place.

    Args:
        gradients: Tensors of any shape and dtype.
        coefficient: A number or a tensor ``[]``. If it is exact in float32, the result is bit for
            bit that of ``torch.nn.utils.clip_grad_norm_``.
    """
    dense = gradients
    # Of hundreds of tensors nearly always all are dense; a set of layouts is built faster than a
    # filtered list.
    if set(map(_layout, gradients)) != {torch.strided}:
        dense = [gradient for gradient in gradients if gradient.layout is torch.strided]
    dtypes = set(map(_dtype, dense))
    if dense and not dtypes <= _EXACT:
        if dense[0].is_cpu:
            # A number would be rounded to the dtype of the gradients, a tensor is not (torch 2.13).
            coefficient = torch.as_tensor(coefficient, dtype=torch.float64)
        elif isinstance(coefficient, Tensor) and is_at_hand(coefficient):
            coefficient = coefficient.item()  # on an accelerator it is the other way round
    if dense:
        torch._foreach_mul_(dense, coefficient)
    if dense is gradients:
        return
    for gradient in gradients:
        if gradient.layout is not torch.strided:
            gradient.mul_(coefficient)


def scale_each_(gradients: list[Tensor], coefficients: Tensor) -> None:
    """Multiplies each gradient, dense or sparse, in place, by its entry of coefficients ``[n]``."""
    if not is_at_hand(coefficients):
        torch._foreach_mul_(gradients, list(coefficients.to(gradients[0].dtype).unbind()))
        return
    # On the host the factors that are 1, usually most of them, cost no pass over memory.
    for gradient, factor in zip(gradients, coefficients.tolist(), strict=True):
        if factor != 1.0:
            gradient.mul_(factor)


def clamp_(gradients: Sequence[Tensor], limit: float) -> None:
    """Limits every element of every gradient to ``[-limit, limit]``, in place; NaN stays NaN.

    Raises:
        TypeError: If a gradient is complex, as complex numbers have no order.
    """
    # All are checked before any is changed, so that an error leaves the gradients as they were.
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
    # Entries with the same index add up, so the limit applies to their sum.
    coalesced = gradient.coalesce() if gradient.layout is torch.sparse_coo else gradient
    coalesced.values().clamp_(-limit, limit)
    if coalesced is not gradient:
        gradient.copy_(coalesced)

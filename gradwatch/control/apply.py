"""Changing gradients in place: the only place where gradwatch writes into a tensor of the user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter

import torch
from torch import Tensor

from gradwatch.control.policy import ClipDecision, ClipPolicy
from gradwatch.control.settled import Settled
from gradwatch.observe.readings import Number, Reading, is_at_hand, number

_dtype, _layout = attrgetter("dtype"), attrgetter("layout")
_EXACT = {torch.float32, torch.float64}


def clip_(
    gradients: list[Tensor], settled: Settled, policy: ClipPolicy | None, left: Number
) -> tuple[Settled, bool]:
    """Asks a policy about the gradients of a step and does to them what it decides, in place.

    Args:
        gradients: The gradients; of sharded ones the parts of this rank.
        settled: Both sides so far.
        policy: The clipping rule; None for none.
        left: The loss scale that the gradients still carry.

    Returns:
        Both sides with the decision in them, and whether elements were limited, so that the norm
        must be taken anew.
    """
    norm, correction = settled.after.total, settled.correction
    decision = ClipDecision() if policy is None else policy.decide(_true_norm(settled))
    coefficient = decision.coefficient
    if coefficient is not None and not norm.at_hand:
        # Nobody has looked yet whether the norm is finite; if it is not, leave the gradients.
        coefficient = torch.where(torch.isfinite(norm.tensor), coefficient, 1.0)
    factor = _factor(coefficient)
    settled = replace(settled, coefficient=factor, threshold=decision.threshold)
    if correction != 1.0:
        exact = factor.tensor if isinstance(factor, Reading) else factor
        scale_(gradients, exact * correction)
    elif coefficient is not None and factor != 1.0:
        scale_(gradients, coefficient)
    if decision.clip_value is None:
        return settled, False
    clamp_(gradients, decision.clip_value * number(left))
    return settled, True


def _factor(coefficient: Tensor | None) -> Number:
    if coefficient is None:
        return 1.0
    return coefficient.item() if is_at_hand(coefficient) else Reading(coefficient)


def _true_norm(settled: Settled) -> Tensor:
    """Returns the total norm in true units: tensor ``[]``."""
    total, unit = settled.after.total.tensor, settled.unit_after
    factor = settled.correction / (unit.tensor if isinstance(unit, Reading) else unit)
    # A multiplication by one would cost a call; the policy must see the very bits of the norm.
    return total if isinstance(factor, float) and factor == 1.0 else total * factor


def scale_(gradients: list[Tensor], coefficient: float | Tensor) -> None:
    """Multiplies every gradient with one number, in place.

    Args:
        gradients: Tensors of any shape and dtype, dense or sparse.
        coefficient: The factor, a number or a tensor ``[]``; one that a float32 holds exactly
            gives the bits that ``torch.nn.utils.clip_grad_norm_`` gives.
    """
    dense = gradients
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


def clamp_(gradients: Sequence[Tensor], limit: float) -> None:
    """Limits every element of every gradient to ``[-limit, limit]``, in place; NaN stays NaN.

    Args:
        gradients: Tensors of any shape and real dtype, dense or sparse.
        limit: The largest magnitude allowed.

    Raises:
        TypeError: If a gradient is complex: its elements have no order.
    """
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

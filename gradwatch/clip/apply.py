"""Functions that scale or clamp many gradients in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter

import torch
from torch import Tensor

from gradwatch.measure.deferred import is_at_hand
from gradwatch.measure.devices import as_exact, sent
from gradwatch.measure.gathering import are_alike, by_kind

_layout = attrgetter("layout")
_EXACT = {torch.float32, torch.float64}
_ROUND = ("cuda", "xpu")
"""Devices that round a factor which is on them to the dtype of what it multiplies, in any case."""


def _groups(gradients: list[Tensor]) -> Iterator[tuple[list[int] | range, list[Tensor]]]:
    """Yields gradients that one batched call can change, each group with its positions."""
    # Of hundreds of tensors nearly always all are dense and of one kind.
    if set(map(_layout, gradients)) == {torch.strided} and are_alike(gradients):
        yield range(len(gradients)), gradients
        return
    for places in by_kind(gradients).values():
        dense = [i for i in places if gradients[i].layout is torch.strided]
        if dense:
            yield dense, [gradients[i] for i in dense]
        for i in set(places).difference(dense):  # no batched call takes sparse ones
            yield [i], [gradients[i]]


def scale_(gradients: list[Tensor], coefficient: float | Tensor) -> None:
    """Multiplies every gradient, dense or sparse, by one number, in place.

    There is one batched call for each device and dtype, and one copy of the number to each device.
    It waits only if the number goes from an accelerator to gradients on the CPU.

    Args:
        gradients: Tensors of any shape and dtype, on any devices.
        coefficient: A number or a tensor ``[]``. If it is exact in float32, the result is bit for
            bit that of ``torch.nn.utils.clip_grad_norm_``.
    """
    there: dict[torch.device, float | Tensor] = {}
    for _, group in _groups(gradients):
        device = group[0].device
        if device not in there:
            there[device] = _factor_on(device, coefficient)
        factor = there[device]
        if group[0].layout is not torch.strided:
            group[0].mul_(factor)
            continue
        if device.type == "cpu" and group[0].dtype not in _EXACT:
            # A number would be rounded to the dtype of the gradients, a tensor is not (torch 2.13).
            factor = as_exact(factor, device)
        elif isinstance(factor, Tensor) and (group[0].dtype in _EXACT or device.type in _ROUND):
            factor = factor.to(group[0].dtype)  # of another dtype, it is not one kernel for all
        torch._foreach_mul_(group, factor)


def _factor_on(device: torch.device, coefficient: float | Tensor) -> float | Tensor:
    if not isinstance(coefficient, Tensor):
        return coefficient
    if device.type != "cpu" and is_at_hand(coefficient):
        # Precise there for any dtype of the gradients, and no copy.
        return coefficient.item()
    return sent(coefficient, device)


def scale_each_(gradients: list[Tensor], coefficients: Tensor) -> None:
    """Multiplies each gradient, dense or sparse, in place, by its entry of coefficients ``[n]``.

    It waits only if coefficients go from an accelerator to gradients on the CPU.
    """
    if not gradients:
        return
    if is_at_hand(coefficients) and gradients[0].is_cpu and are_alike(gradients):
        _scale_on_host_(gradients, coefficients.tolist())
        return
    there: dict[torch.device, Tensor] = {}
    for places, group in _groups(gradients):
        device = group[0].device
        if device not in there:
            there[device] = sent(coefficients, device)
        if is_at_hand(there[device]):
            numbers = there[device].tolist()
            _scale_on_host_(group, [numbers[i] for i in places])
        elif group[0].layout is torch.strided:
            each = there[device].unbind()
            torch._foreach_mul_(group, [each[i] for i in places])
        else:
            group[0].mul_(there[device][places[0]])


def _scale_on_host_(gradients: Sequence[Tensor], factors: Sequence[float]) -> None:
    # On the host the factors that are 1, usually most of them, cost no pass over memory.
    for gradient, factor in zip(gradients, factors, strict=True):
        if factor != 1.0:
            gradient.mul_(factor)


def clamp_(gradients: list[Tensor], limit: float | Tensor) -> None:
    """Limits every element of every gradient to ``[-limit, limit]``, in place; NaN stays NaN.

    It waits only if the limit goes from an accelerator to gradients on the CPU.

    Args:
        gradients: Tensors of any shape and dtype, on any devices.
        limit: A number or a tensor ``[]``; with Inf nothing is changed.

    Raises:
        TypeError: If a gradient is complex, as complex numbers have no order.
    """
    # All are checked before any is changed, so that an error leaves the gradients as they were.
    for gradient in gradients:
        if gradient.is_complex():
            raise TypeError("ClipByValue cannot limit a complex gradient; use ClipByNorm.")
    for _, group in _groups(gradients):
        there = _factor_on(group[0].device, limit)
        if isinstance(there, Tensor):
            there = there.to(group[0].dtype)
        if group[0].layout is not torch.strided:
            _clamp_sparse_(group[0], there)
        elif isinstance(there, Tensor):
            _clamp_on_device_(group, there)
        else:
            torch._foreach_clamp_min_(group, -there)
            torch._foreach_clamp_max_(group, there)


_SMALL = 2**16  # elements; more in one tensor are worth a kernel of their own


def _clamp_on_device_(gradients: list[Tensor], limit: Tensor) -> None:
    # No batched call takes a limit that only the device knows. So the small tensors, of which there
    # may be many, are put into one.
    for gradient in gradients:
        if gradient.numel() > _SMALL:
            torch.clamp(gradient, -limit, limit, out=gradient)
    small = [one for one in gradients if one.numel() <= _SMALL]
    if not small:
        return
    flat = torch.cat([one.reshape(-1) for one in small])
    torch.clamp(flat, -limit, limit, out=flat)
    parts = torch.split(flat, [one.numel() for one in small])
    shaped = [part.view(one.shape) for part, one in zip(parts, small, strict=True)]
    torch._foreach_copy_(small, shaped)


def _clamp_sparse_(gradient: Tensor, limit: float | Tensor) -> None:
    # Entries with the same index add up, so the limit applies to their sum.
    coalesced = gradient.coalesce() if gradient.layout is torch.sparse_coo else gradient
    coalesced.values().clamp_min_(-limit).clamp_max_(limit)
    if coalesced is not gradient:
        gradient.copy_(coalesced)

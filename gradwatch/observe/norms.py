"""Norms of many gradients in one batched pass: pure functions of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from gradwatch.observe.values import gradient_values

_dtype = attrgetter("dtype")
_LOW_PRECISION = (torch.float16, torch.bfloat16)
_UP_TO_FLOAT32 = (*_LOW_PRECISION, torch.float32)


def gradient_norms(
    gradients: list[Tensor], norm_type: float = 2.0, dtype: torch.dtype | None = None
) -> Tensor:
    """Takes the p-norm of each gradient, float16 and bfloat16 accumulated in float32.

    On finite float32 gradients every value equals, bit for bit, the one that
    ``torch.nn.utils.clip_grad_norm_`` sums up.

    Args:
        gradients: Any number of tensors: any shapes, real or complex dtypes, dense or sparse.
        norm_type: The p of the norm, positive; ``math.inf`` for the largest magnitude.
        dtype: That of all gradients, where it is float16, bfloat16 or float32 and known: they need
            not be asked for it then. One that has another one after all is measured right.

    Returns:
        Tensor ``[len(gradients)]`` on the device of the first one, float32 or, where a gradient
        has double precision, float64.
    """
    if not gradients:
        return torch.zeros(0)
    known = dtype in _UP_TO_FLOAT32
    dtypes = {torch.float32} if known else set(map(_dtype, gradients))
    if len(dtypes) == 1:
        accumulator = torch.float32 if known else _accumulator(dtypes.pop())
        try:
            norms = torch._foreach_norm(gradients, norm_type, accumulator)
            return torch.stack(norms)
        except (NotImplementedError, RuntimeError):
            pass  # some are sparse, or on another device
    return _norms_of_groups(gradients, norm_type)


def _norms_of_groups(gradients: Sequence[Tensor], norm_type: float) -> Tensor:
    values = [gradient_values(gradient) for gradient in gradients]
    norms = [torch.zeros((), device=v.device) for v in values]  # what no element adds up to
    for indices, dtype in _groups(values):
        group = [values[i] for i in indices]
        taken = torch._foreach_norm(group, norm_type, dtype)
        for index, norm in zip(indices, taken, strict=True):
            norms[index] = norm
    return torch.stack([norm.to(norms[0].device) for norm in norms])


def total_norm(norms: Tensor, norm_type: float = 2.0) -> Tensor:
    """Combines the norms of parts into the norm of the whole.

    Args:
        norms: Tensor ``[n]`` of p-norms.
        norm_type: The same p.

    Returns:
        Tensor ``[]`` of the same dtype; 0 where ``n`` is 0.
    """
    if norms.numel() == 0:
        return norms.new_zeros(())
    total: Tensor = torch.linalg.vector_norm(norms, norm_type)
    return total


def wide_norms(gradients: Sequence[Tensor], norm_type: float = 2.0) -> Tensor:
    """Takes the same norms with float64 accumulation, for gradients whose float32 norm overflows.

    Args:
        gradients: As for :func:`gradient_norms`.
        norm_type: As for :func:`gradient_norms`.

    Returns:
        Tensor ``[len(gradients)]``, float64.
    """
    norms = [
        torch.linalg.vector_norm(gradient_values(g).to(_wide(g.dtype)), norm_type)
        for g in gradients
    ]
    return torch.stack(norms)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


def _groups(values: Sequence[Tensor]) -> list[tuple[Sequence[int], torch.dtype | None]]:
    """Splits into what one batched call can take, each with the dtype to accumulate in."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, value in enumerate(values):
        if value.numel() == 0:
            continue  # has no largest element
        groups.setdefault((value.device, value.dtype), []).append(index)
    return [(indices, _accumulator(dtype)) for (_, dtype), indices in groups.items()]


def _accumulator(dtype: torch.dtype) -> torch.dtype | None:
    return torch.float32 if dtype in _LOW_PRECISION else None

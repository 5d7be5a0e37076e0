"""The trace of a symmetric matrix that is only known by its products."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TraceEstimate:
    """A trace and how well it is known.

    Attributes:
        value: The trace; NaN without products.
        stderr: Its standard error; 0 where it is exact, NaN where one product says nothing of it.
        probes: Products that were computed.
    """

    value: float
    stderr: float
    probes: int


def estimate_trace(
    product: Callable[[Tensor], Tensor], like: Tensor, probes: int, generator: torch.Generator
) -> TraceEstimate:
    r"""Estimates a trace as the mean of :math:`z^\top A z` over vectors of random signs.

    The expectation of each term is the trace, and of all independent distributions that of signs
    has the least variance: :math:`2 \sum_{i \ne j} A_{ij}^2`, zero for a diagonal matrix. The
    standard error comes from the spread of the terms. A matrix with no more columns than there
    would be vectors is taken column by column: the trace is exact then.

    Args:
        product: Maps a vector ``[n]`` to the product of the matrix with it, ``[n]``.
        like: A vector ``[n]`` with the dtype and on the device that ``product`` wants.
        probes: How many vectors, 0 or more.
        generator: Where the signs come from; on the CPU, so that devices agree.

    Returns:
        The estimate.

    References:
        Hutchinson: A stochastic estimator of the trace of the influence matrix for Laplacian
        smoothing splines. Communications in Statistics 19(2), 1990.
        Meyer, Musco, Musco, Woodruff: Hutch++: Optimal Stochastic Trace Estimation. SOSA 2021,
        arXiv 2010.09649: fewer products for steep spectra, for as many vectors in memory.

    Example:
        >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> estimate_trace(matrix.mv, torch.zeros(2), 4, torch.Generator())
        TraceEstimate(value=5.0, stderr=0.0, probes=2)
    """
    if not probes:
        return TraceEstimate(math.nan, math.nan, 0)
    if like.numel() <= probes:
        return TraceEstimate(_exact(product, like), 0.0, like.numel())
    terms = torch.empty(probes, dtype=torch.float64)
    for index in range(probes):
        signs = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8)
        vector = signs.to(like.device, like.dtype) * 2 - 1
        terms[index] = torch.dot(vector, product(vector))
    stderr = math.nan if probes == 1 else float(terms.std()) / math.sqrt(probes)
    return TraceEstimate(float(terms.mean()), stderr, probes)


def _exact(product: Callable[[Tensor], Tensor], like: Tensor) -> float:
    total = 0.0
    for index in range(like.numel()):
        unit = torch.zeros_like(like)
        unit[index] = 1.0
        total += float(product(unit)[index])
    return total

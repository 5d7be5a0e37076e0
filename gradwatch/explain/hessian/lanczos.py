"""Both ends of the spectrum of a symmetric matrix that is only known by its products."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradwatch.explain.hessian.not_finite import NotFiniteError

_NOT_FINITE = (
    "The product of the Hessian with a vector holds NaN or Inf, so it has no eigenvalues. The loss "
    "or its second derivative overflows, or is undefined there (a square root or a norm of zeros, "
    "say). Look at the loss first; torch.autograd.set_detect_anomaly(True) names the operation."
)
_NOT_SYMMETRIC = (
    "The products of the Hessian do not belong to a symmetric matrix: an entry is {one:.6g} from "
    "one side and {other:.6g} from the other. A custom autograd.Function whose backward is not "
    "made of differentiable operations (detach, .data, NumPy) is the usual cause. Write its "
    "backward with operations on ctx.saved_tensors alone; torch.autograd.gradgradcheck tells."
)


@dataclass(frozen=True, slots=True)
class Extremes:
    """The two ends of a spectrum.

    Attributes:
        smallest: The smallest eigenvalue, negative if the matrix is not positive semidefinite.
        largest: The largest one.
        iterations: Products that were computed.
        converged: Whether both are known as well as was asked for.
    """

    smallest: float
    largest: float
    iterations: int
    converged: bool


def extreme_eigenvalues(
    product: Callable[[Tensor], Tensor], start: Tensor, iterations: int, tolerance: float
) -> Extremes:
    r"""Computes the smallest and the largest eigenvalue by Lanczos iteration.

    After :math:`k` products the matrix is known in the space that they span, where it is
    tridiagonal. The ends of its spectrum there approach those of the whole, both at once and
    whatever their sign, after about the square root of the number of products that power iteration
    takes, which finds the one of largest magnitude only and stalls where two are alike. For an
    eigenvector :math:`s` of the small matrix the error is at most :math:`\beta_k |s_k|`.

    Only three vectors are kept. Without the others rounding makes them lose their orthogonality,
    but only once an eigenvalue has been found, and all it does is to find that one again.

    Args:
        product: Maps a vector ``[n]`` to the product of the matrix with it, ``[n]``.
        start: Vector ``[n]`` to start from, not zero. Random ones have a part of every
            eigenvector.
        iterations: The most products to compute, at least 1.
        tolerance: Stop when both bounds are below this share of the largest magnitude.

    Returns:
        The two ends; zeros for an empty matrix.

    Raises:
        NotFiniteError: If a product is not finite.
        RuntimeError: If the matrix turns out not to be symmetric.

    References:
        Lanczos: An iteration method for the solution of the eigenvalue problem of linear
        differential and integral operators. J. Res. Nat. Bur. Standards 45, 1950.
        Paige: Accuracy and effectiveness of the Lanczos algorithm for the symmetric eigenproblem.
        Linear Algebra and its Applications 34, 1980.

    Example:
        >>> matrix = torch.diag(torch.tensor([-1.0, 2.0, 5.0]))
        >>> found = extreme_eigenvalues(matrix.mv, torch.ones(3), 10, 1e-4)
        >>> round(found.smallest, 3), round(found.largest, 3), found.iterations
        (-1.0, 5.0, 3)
    """
    if not start.numel():
        return Extremes(0.0, 0.0, 0, True)
    diagonal: list[float] = []
    beside: list[float] = []
    before, vector = torch.zeros_like(start), start / torch.linalg.vector_norm(start)
    found = Extremes(math.nan, math.nan, 0, False)
    while len(diagonal) < iterations and not found.converged:
        image = product(vector)
        if beside:
            across = check_finite(torch.dot(before, image))
            seen = max(-found.smallest, found.largest)
            check_symmetry(beside[-1], across, seen, start.dtype)
        diagonal.append(check_finite(torch.dot(vector, image)))
        image = image - diagonal[-1] * vector - (beside[-1] if beside else 0.0) * before
        beta = check_finite(torch.linalg.vector_norm(image))
        found = _ends(diagonal, beside, beta, tolerance, torch.finfo(start.dtype).eps)
        beside.append(beta)
        before, vector = vector, image / beta if beta else image
    return found


def _ends(
    diagonal: list[float], beside: list[float], beta: float, tolerance: float, eps: float
) -> Extremes:
    matrix = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
    values: npt.NDArray[np.float64]
    values, vectors = np.linalg.eigh(matrix)
    scale = max(abs(values[0]), abs(values[-1]))
    error = beta * max(abs(vectors[-1, 0]), abs(vectors[-1, -1]))
    # A remainder of rounding size: the products span all that the start had a part of.
    done = beta <= 4 * eps * scale or error <= tolerance * scale
    return Extremes(float(values[0]), float(values[-1]), len(diagonal), bool(done))


def check_symmetry(one: float, other: float, scale: float, dtype: torch.dtype) -> None:
    """Refuses two entries that belong to no symmetric matrix.

    Args:
        one: An entry.
        other: The one across the diagonal.
        scale: The largest magnitude of an eigenvalue that has been seen.
        dtype: What the products were computed in.

    Raises:
        RuntimeError: If they differ by more than rounding.
    """
    allowed = 30 * math.sqrt(torch.finfo(dtype).eps) * max(scale, one)
    if abs(one - other) > allowed and one > allowed:
        raise RuntimeError(_NOT_SYMMETRIC.format(one=one, other=other))


def check_finite(number: Tensor) -> float:
    """Takes a number out of a tensor ``[]``.

    Raises:
        NotFiniteError: If it is NaN or Inf.
    """
    value = float(number)
    if not math.isfinite(value):
        raise NotFiniteError(_NOT_FINITE)
    return value

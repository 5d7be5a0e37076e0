"""Eigenvalues and trace of a symmetric matrix that is only known by its products."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradwatch.pickles import stable_name

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

_ROUNDING = 100  # units in the last place of 1; a vector that is shorter is nothing else

_Mapped: TypeAlias = tuple[Tensor, Tensor]
"""A vector ``[n]`` and its product with the matrix."""


@stable_name
class NotFiniteError(ValueError):
    """A loss or its Hessian is not finite at these weights; at others it may be."""


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
        return TraceEstimate(_exact_trace(product, like), 0.0, like.numel())
    terms = torch.empty(probes, dtype=torch.float64)
    for index in range(probes):
        signs = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8)
        vector = signs.to(like.device, like.dtype) * 2 - 1
        terms[index] = torch.dot(vector, product(vector))
    # std() of one term is NaN by itself, but torch warns of it.
    stderr = math.nan if probes == 1 else float(terms.std()) / math.sqrt(probes)
    return TraceEstimate(float(terms.mean()), stderr, probes)


def _exact_trace(product: Callable[[Tensor], Tensor], like: Tensor) -> float:
    total = 0.0
    for index in range(like.numel()):
        unit = torch.zeros_like(like)
        unit[index] = 1.0
        total += float(product(unit)[index])
    return total


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
    beside: list[float] = []  # the diagonal, in a symmetric matrix the same above and below
    before, vector = torch.zeros_like(start), start / torch.linalg.vector_norm(start)
    found = Extremes(math.nan, math.nan, 0, False)
    while len(diagonal) < iterations and not found.converged:
        image = product(vector)
        if beside:
            # Lanczos takes this entry from symmetry. Computed, it costs a dot product and shows a
            # matrix that has none, whose eigenvalues would look like any others.
            across = _finite(torch.dot(before, image))
            seen = max(-found.smallest, found.largest)
            _check_symmetry(beside[-1], across, seen, start.dtype)
        diagonal.append(_finite(torch.dot(vector, image)))
        image = image - diagonal[-1] * vector - (beside[-1] if beside else 0.0) * before
        beta = _finite(torch.linalg.vector_norm(image))
        found = _ends(diagonal, beside, beta, tolerance, torch.finfo(start.dtype).eps)
        beside.append(beta)
        before, vector = vector, image / beta if beta else image
    return found


def _ends(
    diagonal: list[float], beside: list[float], beta: float, tolerance: float, eps: float
) -> Extremes:
    matrix = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
    values: NDArray[np.float64]
    values, vectors = np.linalg.eigh(matrix)
    scale = max(abs(values[0]), abs(values[-1]))
    error = beta * max(abs(vectors[-1, 0]), abs(vectors[-1, -1]))
    # A remainder of rounding size: the products span all that the start had a part of.
    done = beta <= 4 * eps * scale or error <= tolerance * scale
    return Extremes(float(values[0]), float(values[-1]), len(diagonal), bool(done))


def _check_symmetry(one: float, other: float, scale: float, dtype: torch.dtype) -> None:
    """Refuses two entries across the diagonal that differ by more than rounding.

    Args:
        one: An entry.
        other: The one across the diagonal.
        scale: The largest magnitude of an eigenvalue that has been seen.
        dtype: What the products were computed in.
    """
    # Not eps itself: the dot products are as long as the model, and their terms cancel.
    allowed = 30 * math.sqrt(torch.finfo(dtype).eps) * max(scale, one)
    if abs(one - other) > allowed and one > allowed:
        raise RuntimeError(_NOT_SYMMETRIC.format(one=one, other=other))


def _finite(number: Tensor) -> float:
    """Returns the number of a tensor ``[]``; raises a NotFiniteError if it is NaN or Inf."""
    value = float(number)
    if not math.isfinite(value):
        raise NotFiniteError(_NOT_FINITE)
    return value


@dataclass(frozen=True, slots=True)
class Eigenpair:
    """The largest eigenvalue.

    Attributes:
        value: The eigenvalue; short of its true value by no more than is said of ``tolerance``.
        vector: Its vector ``[n]``, of length 1.
        runner_up: What comes next to it in all that was looked at, of length 1; None where nothing
            else was.
        iterations: Products that were computed.
        converged: Whether it is known as well as was asked for.
    """

    value: float
    vector: Tensor
    runner_up: Tensor | None
    iterations: int
    converged: bool


def largest_eigenpair(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    iterations: int,
    tolerance: float,
    runner_up: Tensor | None = None,
) -> Eigenpair:
    r"""Computes the largest eigenvalue, and the vectors that the next search can start from.

    Power iteration that looks around: from the vector :math:`x`, the residual
    :math:`r = Hx - \theta x`, the direction of the step before and a runner-up, it takes the
    combination whose quotient :math:`x^\top H x` is largest. Each of these steps costs one product,
    as in power iteration, and gains about what one of Lanczos does; it ends at the largest
    eigenvalue rather than at that of largest magnitude, keeps eight vectors, and starts from
    anywhere. Within :math:`|r|` of :math:`\theta` there is an eigenvalue.

    A search that starts at an eigenvector would stay there, though another may have become the
    largest. It is the runner-up that notices, being the next best of each search.

    Args:
        product: Maps a vector ``[n]`` to the product of the matrix with it, ``[n]``.
        start: Vector ``[n]``, not zero: a random one, or one that is close already.
        iterations: The most products to compute, at least 1.
        tolerance: Stop when the residual is below this share of the largest magnitude seen.
        runner_up: That of a search before; costs one product.

    Raises:
        NotFiniteError: If a product is not finite.
        RuntimeError: If the matrix turns out not to be symmetric.

    References:
        Knyazev: Toward the Optimal Preconditioned Eigensolver: Locally Optimal Block Preconditioned
        Conjugate Gradient Method. SIAM Journal on Scientific Computing 23(2), 2001; here with one
        vector that is improved and no preconditioner.

    Example:
        >>> matrix = torch.diag(torch.tensor([-9.0, 2.0, 5.0]))
        >>> found = largest_eigenpair(matrix.mv, torch.ones(3), 10, 1e-4)
        >>> round(found.value, 3), found.iterations
        (5.0, 3)
    """
    eps = torch.finfo(start.dtype).eps
    vector = start / torch.linalg.vector_norm(start)
    # Products are linear: those of combinations come from those of their parts, at no cost.
    known = [(vector, product(vector))]
    value = _finite(torch.dot(*known[0]))
    scale, done = abs(value), 1
    fresh = None if runner_up is None else _orthonormal(runner_up, [vector])
    while True:
        if fresh is None:
            x, image = known[0]
            residual = image - value * x
            error = _finite(torch.linalg.vector_norm(residual))
            close = error <= max(tolerance, 4 * eps) * scale
            fresh = None if close else _orthonormal(residual / error, [v for v, _ in known])
            if fresh is None:  # close, or the vectors span all that the start had a part of
                return _eigenpair(value, known, done, True)
        if done >= iterations:
            return _eigenpair(value, known, done, False)
        basis = [*known, (fresh, product(fresh))]
        fresh, done = None, done + 1
        known, value, scale = _best(basis, scale)


def _eigenpair(value: float, known: Sequence[_Mapped], done: int, converged: bool) -> Eigenpair:
    runner_up = known[1][0] if len(known) > 1 else None
    return Eigenpair(value, known[0][0], runner_up, done, converged)


def _best(basis: Sequence[_Mapped], scale: float) -> tuple[list[_Mapped], float, float]:
    """Returns the best two combinations and the direction that led to the best, and more.

    Args:
        basis: Two to four orthonormal vectors: that to improve, the runner-up, the direction of the
            step before, and a fresh one, which is last.
        scale: The largest magnitude seen.

    Returns:
        The vectors, the quotient of the first, and the new scale.
    """
    # One stack for up to 16 numbers, so that a device is waited for once.
    dots = torch.stack([torch.dot(v, image) for v, _ in basis for _, image in basis])
    small = np.array([_finite(dot) for dot in dots.double().cpu()])
    small = small.reshape(len(basis), len(basis))
    scale = max(scale, float(np.abs(np.diag(small)).max()))
    _check_symmetry(abs(small[-1, 0]), small[0, -1] * np.sign(small[-1, 0]), scale, dots.dtype)
    values, vectors = np.linalg.eigh((small + small.T) / 2)
    known = [_combined(vectors[:, -1], basis), _combined(vectors[:, -2], basis)]
    # Two vectors have no more than two combinations: no direction is left over.
    if len(basis) > 2:
        step, image = _combined(vectors[2:, -1], basis[2:])
        for other, moved in known:
            along = torch.dot(other, step)
            step, image = step - along * other, image - along * moved
        length = float(torch.linalg.vector_norm(step))
        if length > _ROUNDING * torch.finfo(step.dtype).eps:
            known.append((step / length, image / length))
    return known, float(values[-1]), scale


def _combined(weights: NDArray[np.float64], basis: Sequence[_Mapped]) -> _Mapped:
    vectors, images = zip(*basis, strict=True)
    return _sum(weights, vectors), _sum(weights, images)


def _sum(weights: NDArray[np.float64], vectors: Sequence[Tensor]) -> Tensor:
    total = float(weights[0]) * vectors[0]
    for weight, vector in zip(weights[1:], vectors[1:], strict=True):
        total.add_(vector, alpha=float(weight))
    return total


def _orthonormal(vector: Tensor, others: Sequence[Tensor]) -> Tensor | None:
    """Returns a vector of length 1 without its parts along others; None where nothing is left."""
    for _ in range(2):  # once leaves rounding of the size of what was taken out
        for other in others:
            vector = vector - torch.dot(other, vector) * other
    length = float(torch.linalg.vector_norm(vector))
    return None if length <= _ROUNDING * torch.finfo(vector.dtype).eps else vector / length

"""Eigenvalues and trace of a symmetric matrix, from matrix-vector products alone."""

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
    "or its second derivative overflows, or is undefined there (for example a square root or norm "
    "of zeros). Check the loss first; torch.autograd.set_detect_anomaly(True) names the operation."
)
_NOT_SYMMETRIC = (
    "The products of the Hessian do not belong to a symmetric matrix: an entry is {one:.6g} on one "
    "side of the diagonal and {other:.6g} on the other. The usual cause is a custom "
    "autograd.Function whose backward is not made of differentiable operations (detach, .data, "
    "NumPy). Write its backward with operations on ctx.saved_tensors alone, and check it with "
    "torch.autograd.gradgradcheck."
)

_ROUNDING = 100  # in units of eps; a vector (of what had length 1) below this is only rounding

_Mapped: TypeAlias = tuple[Tensor, Tensor]
"""A vector ``[n]`` and its product with the matrix."""


@stable_name
class NotFiniteError(ValueError):
    """A loss or its Hessian is not finite at the current weights; at others it may be."""


@dataclass(frozen=True, slots=True)
class TraceEstimate:
    """An estimated trace.

    Attributes:
        value: The trace; NaN without products.
        stderr: Standard error of the trace; 0 if it is exact, NaN for a single product.
        probes: Number of products that were computed.
    """

    value: float
    stderr: float
    probes: int


def random_like(like: Tensor, generator: torch.Generator) -> Tensor:
    """Draws a normal vector like another one, on the CPU: a seed gives the same on every device."""
    drawn = torch.randn(like.shape, generator=generator, dtype=torch.float32, device="cpu")
    return drawn.to(like)


def estimate_trace(
    product: Callable[[Tensor], Tensor], like: Tensor, probes: int, generator: torch.Generator
) -> TraceEstimate:
    r"""Estimates a trace as the mean of :math:`z^\top A z` over vectors of random signs.

    The expectation of each term is the trace. Among vectors of independent entries, random signs
    have the least variance: :math:`2 \sum_{i \ne j} A_{ij}^2`, zero for a diagonal matrix. The
    standard error comes from the spread of the terms. If the matrix has no more columns than
    ``probes``, its diagonal is computed column by column, and the trace is exact.

    Args:
        product: Maps a vector ``[n]`` to matrix times vector, ``[n]``.
        like: A vector ``[n]`` with the dtype and device that ``product`` takes.
        probes: Number of random vectors, 0 or more.
        generator: Draws the signs; on the CPU, so that all devices get the same.

    References:
        Hutchinson: A stochastic estimator of the trace of the influence matrix for Laplacian
        smoothing splines. Communications in Statistics 19(2), 1990.
        Meyer, Musco, Musco, Woodruff: Hutch++: Optimal Stochastic Trace Estimation. SOSA 2021,
        arXiv 2010.09649: needs fewer products if the spectrum is steep, but keeps as many vectors
        in memory.

    Example:
        >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> estimate_trace(matrix.mv, torch.zeros(2), 4, torch.Generator())
        TraceEstimate(value=5.0, stderr=0.0, probes=2)
    """
    if not probes:
        return TraceEstimate(math.nan, math.nan, 0)
    if like.numel() <= probes:
        return TraceEstimate(_exact_trace(product, like), 0.0, like.numel())
    terms = torch.empty(probes, dtype=torch.float64, device="cpu")
    for index in range(probes):
        signs = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8, device="cpu")
        vector = signs.to(like.device, like.dtype) * 2 - 1
        terms[index] = torch.dot(vector, product(vector))
    # std() of a single term would be NaN too, but with a warning of torch.
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
        largest: The largest eigenvalue.
        iterations: Number of products that were computed.
        converged: Whether both are within the tolerance.
    """

    smallest: float
    largest: float
    iterations: int
    converged: bool


def extreme_eigenvalues(
    product: Callable[[Tensor], Tensor], start: Tensor, iterations: int, tolerance: float
) -> Extremes:
    r"""Computes the smallest and the largest eigenvalue by Lanczos iteration.

    After :math:`k` products the matrix is known on the subspace that they span, where it is
    tridiagonal. The extreme eigenvalues of that small matrix approach those of the whole, both ends
    at once and of either sign. That takes about the square root of the number of products that
    power iteration needs, which also finds only the eigenvalue of largest magnitude and stalls if
    two have about the same. For an eigenvector :math:`s` of the small matrix the error is at most
    :math:`\beta_k |s_k|`.

    Only three vectors are kept. Without the earlier ones, rounding destroys orthogonality, but only
    after an eigenvalue has converged, and the only effect is that this eigenvalue is found again.

    Args:
        product: Maps a vector ``[n]`` to matrix times vector, ``[n]``.
        start: Vector ``[n]`` to start from, not zero. A random one has a component along every
            eigenvector.
        iterations: Maximum number of products, at least 1.
        tolerance: Stop when both error bounds are below this share of the largest magnitude.

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
    beside: list[float] = []  # the entries next to the diagonal, equal above and below
    before, vector = torch.zeros_like(start), start / torch.linalg.vector_norm(start)
    found = Extremes(math.nan, math.nan, 0, False)
    while len(diagonal) < iterations and not found.converged:
        image = product(vector)
        if beside:
            # Lanczos gets this entry from symmetry. Computing it costs a dot product, and reveals a
            # matrix that is not symmetric, whose eigenvalues would otherwise look plausible.
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
    # If only rounding remains, the products span all eigenvectors that the start contains.
    done = beta <= 4 * eps * scale or error <= tolerance * scale
    return Extremes(float(values[0]), float(values[-1]), len(diagonal), bool(done))


def _check_symmetry(one: float, other: float, scale: float, dtype: torch.dtype) -> None:
    """Raises a RuntimeError if two mirrored entries differ by more than rounding.

    Args:
        one: An entry above the diagonal, not negative.
        other: The same entry below the diagonal.
        scale: The largest magnitude of an eigenvalue seen so far.
        dtype: The dtype of the products.
    """
    # Far more than eps: the dot products are as long as the model, and their terms cancel.
    allowed = 30 * math.sqrt(torch.finfo(dtype).eps) * max(scale, one)
    if abs(one - other) > allowed and one > allowed:
        raise RuntimeError(_NOT_SYMMETRIC.format(one=one, other=other))


def _finite(number: Tensor) -> float:
    """Returns a 0-dimensional tensor as a float; raises a NotFiniteError for NaN and Inf."""
    value = float(number)
    if not math.isfinite(value):
        raise NotFiniteError(_NOT_FINITE)
    return value


@dataclass(frozen=True, slots=True)
class Eigenpair:
    """The largest eigenvalue with its eigenvector.

    Attributes:
        value: The eigenvalue; when converged, too small by at most the ``tolerance`` asked for.
        vector: Its eigenvector ``[n]``, of length 1.
        runner_up: The next best vector ``[n]`` in the searched space, of length 1; None if the
            space has only one dimension.
        iterations: Number of products that were computed.
        converged: Whether the residual is within the tolerance.
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

    An improved power iteration. In each step it takes the best combination of four vectors: the
    current vector :math:`x`, the residual :math:`r = Hx - \theta x`, the direction of the previous
    step and a runner-up. Best means that the quotient :math:`x^\top H x` is largest. A step costs
    one product, as in power iteration, and gains about as much as a step of Lanczos. The iteration
    ends at the largest eigenvalue instead of the one of largest magnitude, keeps eight vectors, and
    can start from any vector. There is an eigenvalue within :math:`|r|` of :math:`\theta`.

    A search that starts at an eigenvector would stay there, although another eigenvalue may have
    become the largest. The runner-up, the next best vector of the previous search, reveals that.

    Args:
        product: Maps a vector ``[n]`` to matrix times vector, ``[n]``.
        start: Vector ``[n]``, not zero: a random one, or one that is close already.
        iterations: Maximum number of products, at least 1.
        tolerance: Stop when the residual is below this share of the largest magnitude seen.
        runner_up: The one of a previous search; costs one product.

    Raises:
        NotFiniteError: If a product is not finite.
        RuntimeError: If the matrix turns out not to be symmetric.

    References:
        Knyazev: Toward the Optimal Preconditioned Eigensolver: Locally Optimal Block Preconditioned
        Conjugate Gradient Method. SIAM Journal on Scientific Computing 23(2), 2001; here for a
        single vector and without a preconditioner.

    Example:
        >>> matrix = torch.diag(torch.tensor([-9.0, 2.0, 5.0]))
        >>> found = largest_eigenpair(matrix.mv, torch.ones(3), 10, 1e-4)
        >>> round(found.value, 3), found.iterations
        (5.0, 3)
    """
    eps = torch.finfo(start.dtype).eps
    vector = start / torch.linalg.vector_norm(start)
    # Keep each vector with its product: products of combinations follow by linearity, for free.
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
            if fresh is None:  # close, or the vectors span all eigenvectors that the start contains
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
    """Finds the best combinations of a basis.

    Args:
        basis: Two to four orthonormal vectors: the one to improve, the runner-up, the direction of
            the previous step, and last a fresh one.
        scale: The largest magnitude seen so far.

    Returns:
        The best vector, the runner-up and the direction of this step (if there is one), the
        quotient of the best vector, and the new scale.
    """
    # Stack up to 16 numbers, so that there is only one wait for the device.
    dots = torch.stack([torch.dot(v, image) for v, _ in basis for _, image in basis])
    small = np.array([_finite(dot) for dot in dots.cpu()])
    small = small.reshape(len(basis), len(basis))
    scale = max(scale, float(np.abs(np.diag(small)).max()))
    _check_symmetry(abs(small[-1, 0]), small[0, -1] * np.sign(small[-1, 0]), scale, dots.dtype)
    values, vectors = np.linalg.eigh((small + small.T) / 2)
    known = [_combined(vectors[:, -1], basis), _combined(vectors[:, -2], basis)]
    # With two vectors, the best two combinations use up the space: no direction is left.
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
    """Removes the components along others and normalizes; None if only rounding is left."""
    for _ in range(2):  # a single pass leaves rounding errors of the size of what was removed
        for other in others:
            vector = vector - torch.dot(other, vector) * other
    length = float(torch.linalg.vector_norm(vector))
    return None if length <= _ROUNDING * torch.finfo(vector.dtype).eps else vector / length

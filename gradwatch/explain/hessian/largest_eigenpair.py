"""The largest eigenvalue of a symmetric matrix and its vector, to go on from another time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradwatch.explain.hessian.lanczos import check_finite, check_symmetry

Known: TypeAlias = tuple[Tensor, Tensor]
"""A vector ``[n]`` and its product with the matrix."""

ROUNDING = 100
"""What is shorter than so many units in the last place of 1 is nothing but rounding."""


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

    Returns:
        The eigenvalue and the vectors.

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
    known = [(vector, product(vector))]
    value = check_finite(torch.dot(*known[0]))
    scale, done = abs(value), 1
    fresh = None if runner_up is None else _orthonormal(runner_up, [vector])
    while True:
        if fresh is None:
            x, image = known[0]
            residual = image - value * x
            error = check_finite(torch.linalg.vector_norm(residual))
            close = error <= max(tolerance, 4 * eps) * scale
            fresh = None if close else _orthonormal(residual / error, [v for v, _ in known])
            if fresh is None:  # close, or the vectors span all that the start had a part of
                return _pair(value, known, done, True)
        if done >= iterations:
            return _pair(value, known, done, False)
        basis = [*known, (fresh, product(fresh))]
        fresh, done = None, done + 1
        known, value, scale = _best(basis, scale)


def _pair(value: float, known: Sequence[Known], done: int, converged: bool) -> Eigenpair:
    runner_up = known[1][0] if len(known) > 1 else None
    return Eigenpair(value, known[0][0], runner_up, done, converged)


def _best(basis: Sequence[Known], scale: float) -> tuple[list[Known], float, float]:
    """Takes the best two combinations, and the direction that led to the best.

    Args:
        basis: Two to four orthonormal vectors: that to improve, the runner-up, the direction of the
            step before, and a fresh one, which is last.
        scale: The largest magnitude seen.

    Returns:
        The vectors, the quotient of the first, and the new scale.
    """
    dots = torch.stack([torch.dot(v, image) for v, _ in basis for _, image in basis])
    small = np.array([check_finite(dot) for dot in dots.double().cpu()])
    small = small.reshape(len(basis), len(basis))
    scale = max(scale, float(np.abs(np.diag(small)).max()))
    check_symmetry(abs(small[-1, 0]), small[0, -1] * np.sign(small[-1, 0]), scale, dots.dtype)
    values, vectors = np.linalg.eigh((small + small.T) / 2)
    known = [_combined(vectors[:, -1], basis), _combined(vectors[:, -2], basis)]
    if len(basis) > 2:
        step, image = _combined(vectors[2:, -1], basis[2:])
        for other, moved in known:
            along = torch.dot(other, step)
            step, image = step - along * other, image - along * moved
        length = float(torch.linalg.vector_norm(step))
        if length > ROUNDING * torch.finfo(step.dtype).eps:
            known.append((step / length, image / length))
    return known, float(values[-1]), scale


def _combined(weights: NDArray[np.float64], basis: Sequence[Known]) -> Known:
    vectors, images = zip(*basis, strict=True)
    return _sum(weights, vectors), _sum(weights, images)


def _sum(weights: NDArray[np.float64], vectors: Sequence[Tensor]) -> Tensor:
    total = float(weights[0]) * vectors[0]
    for weight, vector in zip(weights[1:], vectors[1:], strict=True):
        total.add_(vector, alpha=float(weight))
    return total


def _orthonormal(vector: Tensor, others: Sequence[Tensor]) -> Tensor | None:
    """Takes the parts along others out of a vector of length 1; None where nothing is left."""
    for _ in range(2):  # once leaves rounding of the size of what was taken out
        for other in others:
            vector = vector - torch.dot(other, vector) * other
    length = float(torch.linalg.vector_norm(vector))
    return None if length <= ROUNDING * torch.finfo(vector.dtype).eps else vector / length

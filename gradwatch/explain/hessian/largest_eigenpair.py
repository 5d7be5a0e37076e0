"""The largest eigenvalue of a symmetric matrix and its vector, to go on from another time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradwatch.explain.hessian.lanczos import check_finite, check_symmetry


@dataclass(frozen=True, slots=True)
class Eigenpair:
    """The largest eigenvalue.

    Attributes:
        value: The eigenvalue; short of its true value by no more than is said of ``tolerance``.
        vector: Its vector ``[n]``, of length 1.
        iterations: Products that were computed.
        converged: Whether it is known as well as was asked for.
    """

    value: float
    vector: Tensor
    iterations: int
    converged: bool


def largest_eigenpair(
    product: Callable[[Tensor], Tensor], start: Tensor, iterations: int, tolerance: float
) -> Eigenpair:
    r"""Computes the largest eigenvalue, and the vector that the next search can start from.

    Power iteration that looks one step around: from the vector :math:`x`, the residual
    :math:`r = Hx - \theta x` and the direction of the step before, it takes the combination whose
    quotient :math:`x^\top H x` is largest. Each of these steps costs one product, as in power
    iteration, and gains about what one of Lanczos does; it ends at the largest eigenvalue rather
    than at that of largest magnitude, keeps six vectors, and starts from anywhere. Within
    :math:`|r|` of :math:`\theta` there is an eigenvalue.

    Args:
        product: Maps a vector ``[n]`` to the product of the matrix with it, ``[n]``.
        start: Vector ``[n]``, not zero: a random one, or one that is close already.
        iterations: The most products to compute, at least 1.
        tolerance: Stop when the residual is below this share of the largest magnitude seen.

    Returns:
        The eigenvalue and its vector.

    Raises:
        NotFiniteError: If a product is not finite.
        RuntimeError: If the matrix turns out not to be symmetric.

    References:
        Knyazev: Toward the Optimal Preconditioned Eigensolver: Locally Optimal Block Preconditioned
        Conjugate Gradient Method. SIAM Journal on Scientific Computing 23(2), 2001; here with one
        vector and no preconditioner.

    Example:
        >>> matrix = torch.diag(torch.tensor([-9.0, 2.0, 5.0]))
        >>> found = largest_eigenpair(matrix.mv, torch.ones(3), 10, 1e-4)
        >>> round(found.value, 3), found.iterations
        (5.0, 3)
    """
    eps = torch.finfo(start.dtype).eps
    x = start / torch.linalg.vector_norm(start)
    image = product(x)
    basis: list[tuple[Tensor, Tensor]] = []  # the direction of the step before, and its image
    value = check_finite(torch.dot(x, image))
    scale, done = abs(value), 1
    while True:
        residual = image - value * x
        error = check_finite(torch.linalg.vector_norm(residual))
        if error <= max(tolerance * scale, 4 * eps * scale):
            return Eigenpair(value, x, done, True)
        if done >= iterations:
            return Eigenpair(value, x, done, False)
        fresh = _orthonormal(residual / error, [x, *(vector for vector, _ in basis)])
        if fresh is None:  # the three span all that the start had a part of
            return Eigenpair(value, x, done, True)
        basis.append((fresh, product(fresh)))
        done += 1
        x, image, value, direction, scale = _best([(x, image), *basis], scale)
        basis = [] if direction is None else [direction]


def _best(
    basis: Sequence[tuple[Tensor, Tensor]], scale: float
) -> tuple[Tensor, Tensor, float, tuple[Tensor, Tensor] | None, float]:
    """Takes the combination with the largest quotient, and the direction that led there.

    Args:
        basis: Two or three orthonormal vectors and their images, that to improve first.
        scale: The largest magnitude seen.

    Returns:
        The vector, its image, its quotient, the direction and its image, and the new scale.
    """
    dots = torch.stack([torch.dot(v, image) for v, _ in basis for _, image in basis])
    small = np.array([check_finite(dot) for dot in dots.double().cpu()])
    small = small.reshape(len(basis), len(basis))
    scale = max(scale, float(np.abs(np.diag(small)).max()))
    check_symmetry(small[-1, 0], small[0, -1], scale, basis[0][0].dtype)
    values, vectors = np.linalg.eigh((small + small.T) / 2)
    weights = vectors[:, -1].tolist()
    x, image = (_combined(weights, column) for column in zip(*basis, strict=True))
    step, moved = (_combined(weights[1:], column) for column in zip(*basis[1:], strict=True))
    along = torch.dot(x, step)
    step, moved = step - along * x, moved - along * image
    length = float(torch.linalg.vector_norm(step))
    if length <= 100 * torch.finfo(x.dtype).eps:  # nothing but rounding is left of it
        return x, image, float(values[-1]), None, scale
    return x, image, float(values[-1]), (step / length, moved / length), scale


def _combined(weights: Sequence[float], vectors: Sequence[Tensor]) -> Tensor:
    total = weights[0] * vectors[0]
    for weight, vector in zip(weights[1:], vectors[1:], strict=True):
        total = total.add(vector, alpha=weight)
    return total


def _orthonormal(vector: Tensor, others: Sequence[Tensor]) -> Tensor | None:
    """Takes the parts along others out of a vector of length 1; None where nothing is left."""
    for _ in range(2):  # once leaves rounding of the size of what was taken out
        for other in others:
            vector = vector - torch.dot(other, vector) * other
    length = float(torch.linalg.vector_norm(vector))
    return None if length <= 100 * torch.finfo(vector.dtype).eps else vector / length

"""Section 8: Jacobian, Hessian, their products with vectors, and a loss that uses a gradient.

All at (x, y) = (1, 2), of f = x^2 y + y^3 and of F = (x^2 y, x + y^3):

    gradient of f  (2xy, x^2 + 3y^2)       = (4, 13)
    Hessian of f   [[2y, 2x], [2x, 6y]]    = [[4, 2], [2, 12]], eigenvalues 8 -+ sqrt(20)
    Jacobian of F  [[2xy, x^2], [1, 3y^2]] = [[4, 1], [1, 12]]
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.func import grad, jacrev, vjp

import gradwatch
from _table import compare

AT = torch.tensor([1.0, 2.0])


def f(p: Tensor) -> Tensor:
    """Returns x^2 y + y^3."""
    return p[0] ** 2 * p[1] + p[1] ** 3


def vector_jacobian(v: Tensor) -> float:
    """Returns |v J|, by a backward of F with the weights v, which does not form the Jacobian."""
    p = AT.clone().requires_grad_()
    with gradwatch.watch({"p": p}) as watcher:
        torch.stack([p[0] ** 2 * p[1], p[0] + p[1] ** 3]).backward(v)
    return watcher.last.grad_norm


def penalized() -> gradwatch.StepRecord:
    """Differentiates f + 0.1 |gradient of f|^2 / 2: (I + 0.1 H) times the gradient of f."""
    p = AT.clone().requires_grad_()
    with gradwatch.watch({"p": p}) as watcher:
        (gradient,) = torch.autograd.grad(f(p), p, create_graph=True)  # not into p.grad
        (f(p) + 0.1 * gradient.square().sum() / 2).backward()
    return watcher.last


def growth(lr: float, steps: int = 30) -> float:
    """Runs gradient descent on p H p / 2, and returns the growth of the gradient norm per step."""
    bowl, p = jacrev(grad(f))(AT), torch.ones(2, requires_grad=True)
    optimizer = torch.optim.SGD([p], lr=lr)
    with gradwatch.watch({"p": p}, optimizer) as watcher:
        for _ in range(steps):
            (p @ bowl @ p / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
    norms = watcher.history.steps()["grad_norm"].tolist()
    return norms[-1] / norms[-2]


def main() -> dict[str, float]:
    """Runs the section, and returns the measured numbers."""
    print("Hessian of f:", jacrev(grad(f))(AT).tolist())
    _, hessian_times = vjp(grad(f), AT)  # a Hessian is symmetric: u H is H u
    (product,) = hessian_times(torch.tensor([1.0, -1.0]))
    p = AT.clone().requires_grad_()
    bends, step = gradwatch.curvature({"p": p}, lambda: f(p)), penalized()
    rate = bends.learning_rate_limit
    return compare(
        {
            "|v J|, v = (1, 2)": (math.hypot(6, 25), vector_jacobian(torch.tensor([1.0, 2.0]))),
            "|H u|, u = (1, -1)": (math.hypot(2, -10), product.norm().item()),
            "largest eigenvalue of H": (8 + 20**0.5, bends.largest_eigenvalue),
            "smallest eigenvalue of H": (8 - 20**0.5, bends.smallest_eigenvalue),
            "trace of H": (4 + 12, bends.trace),
            "norm with the penalty": (math.hypot(4 + 4.2, 13 + 16.4), step.grad_norm),
            "largest rate that does not grow": (2 / (8 + 20**0.5), rate),
            "growth per step at 0.9 of it": (0.8, growth(0.9 * rate)),
            "growth per step at 1.1 of it": (1.2, growth(1.1 * rate)),
        }
    )


if __name__ == "__main__":
    main()

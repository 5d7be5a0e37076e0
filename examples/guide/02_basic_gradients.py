"""Section 2: gradients of a number, of several tensors, of a vector, and of a determinant."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import gradwatch
from _table import compare


def norms(function: Callable[..., Tensor], weights: Tensor | None = None, **at: Tensor) -> dict:
    """Runs one backward under gradwatch.

    Args:
        function: The function to differentiate.
        weights: The weight of each output, if there are several.
        **at: The tensors to differentiate with respect to.

    Returns:
        The gradient norm of each tensor by name, and the norm of all of them as ``total``.
    """
    leaves = {name: tensor.requires_grad_() for name, tensor in at.items()}
    with gradwatch.watch(leaves) as watcher:
        function(**leaves).backward(weights)
    each = watcher.history.parameters().set_index("parameter")["grad_norm"]
    return {**each, "total": watcher.last.grad_norm}


def main() -> dict[str, float]:
    """Runs the section, and returns the measured numbers."""
    # One number: d(x^3 - 2x)/dx = 3x^2 - 2.
    scalar = norms(lambda x: x**3 - 2 * x, x=torch.tensor(3.0))
    # Two: d(x^2 y + y) = (2xy, x^2 + 1); the total norm is the norm of the two norms.
    two = norms(lambda x, y: x**2 * y + y, x=torch.tensor(2.0), y=torch.tensor(3.0))
    # With several outputs, backward() needs a weight for each of them: 2 x v.
    x, v = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, -1.0])
    vector = norms(lambda x: x**2, weights=v, x=x)
    # A determinant: the cofactors, [[d, -c], [-b, a]] for a matrix [[a, b], [c, d]].
    matrix = torch.tensor([[2.0, 1.0], [3.0, 4.0]])
    determinant = norms(torch.det, input=matrix)
    print(f"gradient of the determinant: {matrix.grad.round(decimals=3).tolist()}")
    return compare(
        {
            "|d(x^3 - 2x)/dx| at 3": (3 * 3**2 - 2, scalar["total"]),
            "|dz/dx| at (2, 3)": (2 * 2 * 3, two["x"]),
            "|dz/dy| at (2, 3)": (2**2 + 1, two["y"]),
            "both together": ((12**2 + 5**2) ** 0.5, two["total"]),
            "|v J| of x^2": ((2**2 + 0 + 6**2) ** 0.5, vector["total"]),
            "|d det/dA|": ((4**2 + 3**2 + 1 + 2**2) ** 0.5, determinant["total"]),
            "d det/dA in row 0, column 1": (-3, matrix.grad[0, 1].item()),
        }
    )


if __name__ == "__main__":
    main()

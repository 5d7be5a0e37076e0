"""Section 5: a custom gradient, and how to find a wrong one, also inside a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

import gradwatch
from _table import compare


class Cube(Function):
    """x^3, whose derivative is 3 x^2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Saves x for the backward."""
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Multiplies by the derivative."""
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class WrongCube(Cube):
    """The same forward with a wrong derivative."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Multiplies by 2 x^2 instead of 3 x^2."""
        (x,) = ctx.saved_tensors
        return 2 * x**2 * gradient


class Cubed(nn.Module):
    """A layer that uses the wrong function."""

    def forward(self, x: Tensor) -> Tensor:
        """Cubes each element."""
        return WrongCube.apply(x)


def norm(function: type[Function]) -> float:
    """Runs one backward at x = 2 under gradwatch."""
    x = torch.tensor(2.0, requires_grad=True)
    with gradwatch.watch({"x": x}) as watcher:
        function.apply(x).backward()
    return watcher.last.grad_norm


def main() -> dict[str, float]:
    """Runs the section, and returns the measured numbers."""
    torch.manual_seed(0)
    right = gradwatch.check_gradients(Cube.apply, torch.tensor(2.0))
    wrong = gradwatch.check_gradients(WrongCube.apply, torch.tensor(2.0)).failures[0]
    model = nn.Sequential(nn.Linear(2, 3), Cubed(), nn.Linear(3, 1))
    inside = gradwatch.check_gradients(model, torch.randn(4, 2))
    print(*(f"In the model, look at {culprit}." for culprit in inside.culprits))
    print("Wrong because of it:", ", ".join(failure.name for failure in inside.failures))
    return compare(
        {
            "Cube at 2: gradient": (3 * 2**2, norm(Cube)),
            "WrongCube at 2: gradient": (2 * 2**2, norm(WrongCube)),
            "Cube: passes the check": (1, right.ok),
            "WrongCube: analytic": (2 * 2**2, wrong.analytic),
            "WrongCube: numeric": (3 * 2**2, wrong.numeric),
            "in the model: wrong tensors of 5": (3, len(inside.failures)),
        }
    )


if __name__ == "__main__":
    main()

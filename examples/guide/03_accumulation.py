"""Section 3: how gradients accumulate: by mistake, on purpose, and with the right weights."""

from __future__ import annotations

import torch
from torch import Tensor

import gradwatch
from _table import compare
from gradwatch.testing import LinearModel

X = torch.arange(1.0, 7.0)  # six examples; the target of each is its x


def forgotten_zero_grad() -> list[float]:
    """Takes three steps without zero_grad(); each backward adds (3, 4)."""
    model = LinearModel([3.0, 4.0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer) as watcher:
        for _ in range(3):
            model().backward()
            optimizer.step()
    return watcher.history.steps()["grad_norm"].tolist()


def two_losses() -> gradwatch.StepRecord:
    """Adds up the gradients of x^2 and x^3 for one step."""
    x = torch.tensor(2.0, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.1)
    with gradwatch.watch({"x": x}, optimizer) as watcher:
        (x**2).backward()
        (x**3).backward()
        optimizer.step()
        optimizer.zero_grad()
    return watcher.last


def in_parts(weighted: bool) -> float:
    """Takes one step on the mean squared error of w x, in micro-batches of 4 and 2 examples."""
    w = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.01)
    with gradwatch.watch({"w": w}, optimizer, accumulate=2) as watcher:
        for x in (X[:4], X[4:]):
            watcher.backward(squared_error(w, x), weight=len(x) if weighted else None)
            watcher.step()  # steps after the second
    return watcher.last.grad_norm


def squared_error(w: Tensor, x: Tensor) -> Tensor:
    """Returns the mean over the examples: its derivative at w = 0 is -2 mean(x^2)."""
    return (w * x - x).square().mean()


def main() -> dict[str, float]:
    """Runs the section, and returns the measured numbers."""
    first, second, third = forgotten_zero_grad()
    both = two_losses()
    return compare(
        {
            "zero_grad forgotten, step 1": (5, first),
            "zero_grad forgotten, step 2": (10, second),
            "zero_grad forgotten, step 3": (15, third),
            "d(x^2 + x^3)/dx at 2": (2 * 2 + 3 * 2**2, both.grad_norm),
            "micro-batches of that step": (2, both.micro_batches),
            "4 + 2 examples, weighted": (2 * 91 / 6, in_parts(weighted=True)),
            "4 + 2 examples, mean of means": ((2 * 30 / 4 + 2 * 61 / 2) / 2, in_parts(False)),
        }
    )


if __name__ == "__main__":
    main()

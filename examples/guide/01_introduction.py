"""Section 1: the graph that a forward records, and the chain rule that a backward follows.

One weight, one input, loss = (tanh(w x) - t)^2. The derivative by the chain rule is written out
below. Autograd gets the same number by walking the graph, and gradwatch records its norm.
"""

from __future__ import annotations

import math
from typing import Any

import torch

import gradwatch
from _table import compare

W, X, T = 0.5, 2.0, 1.0


def path(node: Any) -> list[str]:
    """Follows the first input of each node of the graph, from the loss to a leaf."""
    names = []
    while node is not None:
        names.append(type(node).__name__)
        node = node.next_functions[0][0] if node.next_functions else None
    return names


def by_hand() -> float:
    """Returns the derivative by the chain rule: of the square, times tanh, times w x."""
    tanh = math.tanh(W * X)
    return 2 * (tanh - T) * (1 - tanh**2) * X


def main() -> dict[str, float]:
    """Runs the section, and returns the measured numbers."""
    w = torch.tensor(W, requires_grad=True)
    with gradwatch.watch({"w": w}) as watcher:
        loss = (torch.tanh(w * X) - T) ** 2
        print("graph:", " <- ".join(path(loss.grad_fn)))
        loss.backward()
    print("no optimizer steps w, so each backward counts as a step:", len(watcher.history))
    return compare(
        {
            "dloss/dw, in w.grad": (by_hand(), w.grad.item()),
            "grad_norm, its magnitude": (abs(by_hand()), watcher.last.grad_norm),
        }
    )


if __name__ == "__main__":
    main()

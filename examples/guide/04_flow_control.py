"""Section 4: where gradients stop (detach, no_grad, frozen tensors), and how that shows."""

from __future__ import annotations

import torch
from torch import Tensor

import gradwatch
from _table import compare


def detached_half() -> float:
    """Differentiates x^2 + x^2 at 3, with the second term detached."""
    x = torch.tensor(3.0, requires_grad=True)
    with gradwatch.watch({"x": x}) as watcher:
        (x**2 + x.detach() ** 2).backward()
    return watcher.last.grad_norm


def switched(train: bool) -> Tensor:
    """Computes with or without a graph; requires_grad of the tensor stays True."""
    x = torch.tensor(3.0, requires_grad=True)
    with torch.set_grad_enabled(train):
        return x**2 + 3 * x + 1


def four_branches() -> gradwatch.Watcher:
    """Takes a step with four branches: one learns, one is detached, one is times 0, one frozen."""
    names = ("learns", "cut_off", "times_zero", "frozen")
    w = {name: torch.ones((), requires_grad=True) for name in names}
    w["frozen"].requires_grad_(False)
    optimizer = torch.optim.SGD(w.values(), lr=0.1)
    with gradwatch.watch(w, optimizer, statistics=["zeros"]) as watcher:
        loss = 3 * w["learns"] + (5 * w["cut_off"]).detach() + 0 * w["times_zero"] + w["frozen"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return watcher


def main() -> dict[str, float]:
    """Runs the section, and returns the measured numbers."""
    history = four_branches().history
    print(*history.events()["message"], sep="\n")
    parameters = history.parameters().set_index("parameter")
    silent = history.events().query("kind == 'no_gradient'")["parameter"]
    return compare(
        {
            "d/dx of x^2 + x.detach()^2 at 3": (2 * 3, detached_half()),
            "graph with set_grad_enabled(True)": (1, switched(True).requires_grad),
            "graph with set_grad_enabled(False)": (0, switched(False).requires_grad),
            "learns: norm": (3, parameters["grad_norm"]["learns"]),
            "times_zero: norm": (0, parameters["grad_norm"]["times_zero"]),
            "times_zero: share of zeros": (1, parameters["zeros"]["times_zero"]),
            "cut_off: events": (1, (silent == "cut_off").sum()),
            "frozen: events": (0, (silent == "frozen").sum()),
        }
    )


if __name__ == "__main__":
    main()

"""Section 9: finite differences, a gradient that vanishes with depth, a NaN, an explosion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import gradwatch
from _table import compare

DEPTH = 10


def differences(eps: float) -> float:
    """Computes the slope of x^2 at 3 by finite differences in float32."""
    x = torch.tensor(3.0)
    return (((x + eps) ** 2 - (x - eps) ** 2) / (2 * eps)).item()


def fixed_point() -> float:
    """Finds the s with sigmoid(s) = s, which sigmoid layers with weight 1 do not change."""
    s = torch.tensor(0.5, dtype=torch.float64)
    for _ in range(100):
        s = s.sigmoid()
    return s.item()


def deep() -> gradwatch.History:
    """Takes one step through ten sigmoids."""
    parts = [part for _ in range(DEPTH) for part in (nn.Linear(1, 1, bias=False), nn.Sigmoid())]
    model = nn.Sequential(*parts)
    for weight in model.parameters():
        nn.init.ones_(weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer, statistics=["weight_norm"]) as watcher:
        model(torch.full((1, 1), fixed_point())).sum().backward()
        optimizer.step()
    return watcher.history


def train(
    loss: Callable[[Tensor, float], Tensor], batches: Sequence[float], lr: float, **options: Any
) -> gradwatch.Watcher:
    """Trains one weight, which starts at 1."""
    w = torch.ones((), requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=lr)
    with gradwatch.watch({"w": w}, optimizer, **options) as watcher:
        for batch in batches:
            loss(w, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    return watcher


def main() -> dict[str, float]:
    """Runs the section, and returns the measured numbers."""
    flow = deep().flow()
    columns = ["grad_norm", "weight_norm", "relative_grad"]
    print(flow[columns].iloc[::3].to_string(float_format="{:.3g}".format))
    # The derivative of the root of w x at x = 0 is infinity times 0.
    nan = train(lambda w, x: (w * x).sqrt(), (4, 9, 0, 1), lr=0.0, on_nonfinite="skip")
    # Each step on 2 w^2 with a learning rate of 1 multiplies w by 1 - 4.
    large = train(lambda w, x: 2 * w**2, range(4), lr=1.0, exploding_norm=100.0)
    print(*(event.message for event in (*nan.events, *large.events)), sep="\n")
    print(*(f"{finding.kind}: {finding.title}" for finding in large.report()), sep="\n")
    check = gradwatch.check_gradients(torch.square, torch.tensor(3.0))
    s, norms = fixed_point(), flow["grad_norm"]
    return compare(
        {
            "float32 differences, step 1e-7": (0, differences(1e-7)),
            "check_gradients, in float64": (1, check.ok),
            "ten sigmoids: last layer": (s * s * (1 - s), norms.iloc[-1]),
            "ten sigmoids: first layer": (s * (s * (1 - s)) ** DEPTH, norms.iloc[0]),
            "step of the NaN": (3, nan.events[0].step),
            "norm of the step after it": (0.5, nan.last.grad_norm),
            "first step above 100": (4, large.events[0].step),
            "its norm": (4 * 3**3, large.events[0].value),
            "findings, one of them exploding": (1, len(large.report().of_kind("exploding"))),
        }
    )


if __name__ == "__main__":
    main()

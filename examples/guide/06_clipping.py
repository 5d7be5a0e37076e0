"""Section 6: norms before and after a clip, by the loop or by gradwatch, by norm and by value."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

import gradwatch
from _table import compare
from gradwatch.testing import LinearModel


def own_clip(parameters: Iterable[Tensor], limit: float) -> None:
    """Scales all gradients so that their total norm is at most the limit."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    for gradient in gradients:
        # Not gradient.data: gradwatch cannot notice writes that bypass the version counter.
        gradient.mul_((limit / (norm + 1e-6)).clamp(max=1))


def step(
    gradient: list[float],
    by_loop: Callable[[Iterable[Tensor]], object] | None = None,
    by_gradwatch: float | gradwatch.ClipPolicy | None = None,
) -> gradwatch.StepRecord:
    """Takes one step with a known gradient: clipped by the loop, by gradwatch, or not at all."""
    model = LinearModel(gradient)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with gradwatch.watch(model, optimizer, clip=by_gradwatch) as watcher:
        model().backward()
        if by_loop is not None:
            by_loop(model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    return watcher.last


def main() -> dict[str, float]:
    """Runs the section, and returns the measured numbers."""
    utils = torch.nn.utils
    steep = [3.0, 4.0]
    torchs = step(steep, by_loop=lambda p: utils.clip_grad_norm_(p, 1.0))
    own = step(steep, by_loop=lambda p: own_clip(p, 1.0))
    ours = step(steep, by_gradwatch=1.0)
    small = step([0.3, 0.4], by_gradwatch=1.0)
    torchs_value = step([6.0, -1.0], by_loop=lambda p: utils.clip_grad_value_(p, 2.0))
    value = step([6.0, -1.0], by_gradwatch=gradwatch.ClipByValue(2.0))
    return compare(
        {
            "norm before": (5, torchs.grad_norm),
            "after clip_grad_norm_": (1, torchs.grad_norm_clipped),
            "after a function of one's own": (1, own.grad_norm_clipped),
            "after watch(clip=1.0)": (1, ours.grad_norm_clipped),
            "its factor": (1 / 5, ours.clip_coef),
            "the factor for a norm of 0.5": (1, small.clip_coef),
            "(6, -1): norm before": ((6**2 + 1) ** 0.5, value.grad_norm),
            "after clip_grad_value_": ((2**2 + 1) ** 0.5, torchs_value.grad_norm_clipped),
            "after ClipByValue(2.0)": ((2**2 + 1) ** 0.5, value.grad_norm_clipped),
        }
    )


if __name__ == "__main__":
    main()

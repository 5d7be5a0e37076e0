"""Section 7: the memory that a backward needs, and how much of it checkpointing saves."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradwatch
from _table import compare

LAYERS, BATCH, WIDTH = 8, 32, 64
KIB = BATCH * WIDTH * 4 / 1024  # one activation in float32


class Kept:
    """Counts the memory that a forward saves for the backward, without the weights."""

    def __init__(self, model: nn.Module) -> None:
        self._weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._storages: dict[int, int] = {}

    @property
    def kib(self) -> float:
        """Memory saved so far, in KiB; tensors that share memory count once."""
        return sum(self._storages.values()) / 1024

    def pack(self, tensor: Tensor) -> Tensor:
        """Counts a tensor that autograd saves."""
        storage = tensor.untyped_storage()
        if tensor.numel() > 1 and storage.data_ptr() not in self._weights:
            self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor


def run(per_segment: int) -> tuple[float, gradwatch.StepRecord, list[bool]]:
    """Takes one step, in checkpointed segments of ``per_segment`` layers; 0 for no checkpoints.

    Returns:
        KiB saved, the step, and whether each ``.grad`` is still set after ``zero_grad()``.
    """
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(LAYERS)]
    model, x = nn.Sequential(*layers), torch.randn(BATCH, WIDTH)
    optimizer, kept = torch.optim.SGD(model.parameters(), lr=0.1), Kept(model)
    with gradwatch.watch(model, optimizer) as watcher:
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
            size = per_segment or LAYERS
            for start in range(0, LAYERS, size):
                segment = model[start : start + size]
                x = checkpoint(segment, x, use_reentrant=False) if per_segment else segment(x)
            loss = x.square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return kept.kib, watcher.last, [p.grad is not None for p in model.parameters()]


def main() -> dict[str, float]:
    """Runs the section, and returns the measured numbers."""
    plain, step, gradients = run(per_segment=0)
    pairs, same, _ = run(per_segment=2)
    singles, _, _ = run(per_segment=1)
    return compare(
        {
            "kept without checkpoints, KiB": ((LAYERS + 1) * KIB, plain),
            "kept in segments of 2 layers, KiB": ((LAYERS / 2 + 1) * KIB, pairs),
            "kept in segments of 1 layer, KiB": ((LAYERS + 1) * KIB, singles),
            "norm with checkpoints / without": (1, same.grad_norm / step.grad_norm),
            "backwards seen with checkpoints": (1, same.micro_batches),
            "gradients there after zero_grad()": (0, sum(gradients)),
        }
    )


if __name__ == "__main__":
    main()

"""A model that runs out of memory where and when it is told to, and batches for it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import gradwatch

LENGTHS = (1, 8, 8, 1, 8, 8)  # the first fits at any size; with accumulate=3 the second fails


class Fault:
    """Runs out of memory above a size, in a micro-batch that holds a certain example."""

    def __init__(self, limit: int, place: str = "forward", example: int = 0) -> None:
        self.limit, self.place, self.example = limit, place, example
        self.sizes: list[int] = []

    def strikes(self, numbers: Tensor, place: str) -> bool:
        return place == self.place and len(numbers) > self.limit and self.example in numbers

    def check(self, numbers: Tensor, place: str) -> None:
        if self.strikes(numbers, place):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class _Boundary(torch.autograd.Function):
    """The identity; what comes after it in the model has its gradients when its backward fails."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, numbers: Tensor, fault: Fault) -> Tensor:
        ctx.numbers, ctx.fault = numbers, fault
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.fault.check(ctx.numbers, "backward")
        return gradient, None, None


class Model(nn.Module):
    """Buffers, random numbers, and a place to run out of memory between two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 1)
        self.norm, self.drop = nn.BatchNorm1d(3), nn.Dropout()

    def forward(self, x: Tensor, numbers: Tensor, fault: Fault) -> Tensor:
        x = self.drop(self.norm(self.first(x)))
        return self.last(_Boundary.apply(torch.tanh(x), numbers, fault))


def batch_of(index: int) -> dict[str, Tensor]:
    """Return a deterministic batch of sequences of three."""
    length, generator = LENGTHS[index], torch.Generator().manual_seed(index)
    return {
        "x": torch.randn(length, 3, 4, generator=generator),
        "tokens": torch.randint(1, 9, (length,), generator=generator),
        "numbers": torch.arange(length),
    }


def plain_closure(model: nn.Module, fault: Fault) -> Callable[[Any], Tensor]:
    """Return a closure that gives the mean loss over examples."""

    def closure(part: dict[str, Tensor]) -> Tensor:
        fault.sizes.append(len(part["x"]))
        output = model(part["x"], part["numbers"], fault)
        fault.check(part["numbers"], "forward")
        return output.square().mean()

    return closure


def closure_with_tokens(model: nn.Module, fault: Fault) -> Callable[[Any], tuple[Tensor, Tensor]]:
    """Return a closure that gives the mean loss over tokens, and their number."""

    def closure(part: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        fault.sizes.append(len(part["x"]))
        output = model(part["x"], part["numbers"], fault)
        fault.check(part["numbers"], "forward")
        weight = part["tokens"].sum()
        return (output.square().mean(dim=(1, 2)) * part["tokens"]).sum() / weight, weight

    return closure


def new_watcher(size: int | None = None, **options: Any) -> tuple[Model, gradwatch.Watcher]:
    """Return a model and a watcher that runs it in micro-batches of a size."""
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    watcher = gradwatch.watch(model, optimizer, **options)
    watcher.load_state_dict({**watcher.state_dict(), "micro_batch_size": size})
    return model, watcher

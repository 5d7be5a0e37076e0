"""What the suites on NaN and Inf share: ways to poison a gradient, a training with one bad batch."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

import gradwatch
from tests.support import zoo
from tests.support.state import snapshot

BAD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class BadBackward(torch.autograd.Function):
    """The identity; its backward overwrites chosen elements of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: dict[int, float]) -> Tensor:
        ctx.values = values
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        for index, value in ctx.values.items():
            grad.view(-1)[index] = value
        return grad, None


def with_bad_backward(x: Tensor, values: dict[int, float]) -> Tensor:
    """Return x; in its backward the elements named by `values` are overwritten."""
    return BadBackward.apply(x, values)


def bad_events(watcher: gradwatch.Watcher) -> pd.DataFrame:
    """Return the rows of events() on NaN and Inf."""
    events = watcher.history.events()
    return events[events["kind"].isin(["nan", "inf"])]


def three_leaves() -> dict[str, Tensor]:
    """Return leaf tensors a, b and c of ten elements."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(10, generator=generator).requires_grad_() for name in "abc"}


def run_with_poison(
    model: nn.Sequential, x: Tensor, before: int, values: dict[int, float]
) -> Tensor:
    """Run the model; in the backward, everything before layer `before` sees a poisoned gradient."""
    for index, layer in enumerate(model):
        x = layer(with_bad_backward(x, values) if index == before else x)
    return x


BATCHES = 6


def state_of(case: zoo.Case, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return a copy of the weights and of the optimizer's state."""
    return copy.deepcopy({"weights": snapshot(case.model), "optimizer": optimizer.state_dict()})


def train_with_poison(
    make: Callable[[Any], torch.optim.Optimizer],
    *,
    poison: int | None = None,
    left_out: int | None = None,
    closure: bool = False,
    mode: str = "unmanaged",
    bad: float = math.nan,
    spread: str = "everywhere",
    set_to_none: bool = True,
    **options: Any,
) -> tuple[dict[str, Any], gradwatch.Watcher]:
    """Train on BATCHES batches, one of them poisoned or left out; return the state and the watcher."""
    case = zoo.mlp()
    optimizer = make(case.model.parameters())
    found = mode == "found"
    with gradwatch.watch(case.model, None if found else optimizer, **options) as watcher:
        for index in range(BATCHES):
            if index == left_out:
                continue

            def loss(index: int = index) -> Tensor:
                batch = case.batch(index)
                if index != poison:
                    return case.loss(case.model, batch)
                if spread == "everywhere":
                    return case.loss(case.model, batch) * bad
                return run_with_poison(case.model, batch[0], 1, {0: bad}).pow(2).mean()

            def evaluate(loss: Callable[[], Tensor] = loss) -> Tensor:
                optimizer.zero_grad(set_to_none=set_to_none)
                value = loss()
                value.backward()
                return value

            if mode == "managed":
                watcher.backward(loss())
                assert watcher.step() == (index != poison)
            elif closure:
                optimizer.step(evaluate)
            else:
                evaluate()
                optimizer.step()
    return state_of(case, optimizer), watcher


def late_poison(
    case: zoo.Case, optimizer: torch.optim.Optimizer, bad_from: int
) -> Callable[[], Tensor]:
    """Return a closure whose gradient is NaN from its `bad_from`-th evaluation on."""
    calls = [0]

    def evaluate() -> Tensor:
        calls[0] += 1
        optimizer.zero_grad()
        loss = case.loss(case.model, case.batch(0))
        (loss * math.nan if calls[0] >= bad_from else loss).backward()
        return loss.detach()

    return evaluate

"""The numbers are right: against float64 on the host, and against what a CPU tells."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import gradwatch
from tests.gpu.place import Place, adamw
from tests.gpu.registry import Found, check, require
from tests.gpu.training import ALL, batch, loss_of, net

STEPS = 4
LOOSE = {"mean": 2e-2, "update_ratio": 2e-2}
"""Relative errors that rounding explains: a mean near 0, and weights of 8 bits."""

CLOSE = 1e-5


@check()
def numbers(place: Place) -> Found:
    """Norms, totals and statistics are those of float64, for three dtypes and a mixture."""
    worst: dict[str, float] = {}
    for name in ("float32", "bfloat16", "float16", "mixed"):
        dtype = torch.bfloat16 if name == "mixed" else getattr(torch, name)
        model = net(place.device, dtype)
        if name == "mixed":
            for module in model.modules():
                if isinstance(module, nn.LayerNorm):
                    module.float()
        for column, error in _errors(place, model, dtype).items():
            worst[f"{name} {column}"] = error
    limits = {name: LOOSE.get(name.split()[1], CLOSE) for name in worst}
    bad = {name: error for name, error in worst.items() if not error < limits[name]}
    require(not bad, f"relative errors too large: {bad}")
    return {name: float(f"{error:.2g}") for name, error in worst.items()}


def _errors(place: Place, model: Any, dtype: torch.dtype) -> dict[str, float]:
    """Returns the largest relative error of the total and of each statistic over some steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    names = [name for name, _ in model.named_parameters()]
    truth = []
    with place.late(), gradwatch.watch(model, optimizer, statistics=ALL) as watcher:
        for step in range(STEPS):
            loss_of(_Casting(model), batch(step, place.device, dtype)).backward()
            gradients = _wide(p.grad for p in model.parameters())
            before = _wide(model.parameters())
            optimizer.step()
            optimizer.zero_grad()
            after = _wide(model.parameters())
            truth.append(list(map(_statistics, gradients, before, after)))
    steps, rows = watcher.history.steps(), watcher.history.parameters()
    worst: dict[str, float] = {}
    for step, of_step in enumerate(truth):
        total = math.sqrt(sum(one["grad_norm"] ** 2 for one in of_step))
        error = abs(steps["grad_norm"].iloc[step] / total - 1)
        worst["total"] = max(worst.get("total", 0.0), error)
        mine = rows[rows["step"] == step + 1].set_index("parameter")
        for name, one in zip(names, of_step, strict=True):
            for column, number in one.items():
                error = _error(float(mine.loc[name, column]), number, column, one["std"])
                worst[column] = max(worst.get(column, 0.0), error)
    return worst


class _Casting(nn.Module):
    """Runs a network whose layers have several dtypes."""

    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            weight = getattr(layer, "weight", None)
            x = layer(x if weight is None else x.to(weight.dtype))
        return x


def _wide(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.detach().cpu().double() for tensor in tensors]


def _statistics(gradient: Tensor, before: Tensor, after: Tensor) -> dict[str, float]:
    weight = before.norm().item()
    return {
        "grad_norm": gradient.norm().item(),
        "max": gradient.abs().max().item(),
        "mean": gradient.mean().item(),
        "std": gradient.std(correction=0).item(),
        "zeros": (gradient == 0).double().mean().item(),
        "weight_norm": weight,
        "update_ratio": (after - before).norm().item() / weight if weight else math.nan,
    }


def _error(got: float, expected: float, column: str, std: float) -> float:
    if math.isnan(got) and math.isnan(expected):
        return 0.0
    # A mean is a difference of large numbers: it is judged beside the spread of what it is of.
    least = 1e-12 + (1e-4 * std if column == "mean" else 0.0)
    return abs(got - expected) / (abs(expected) + least)


def _poisoned(policy: str, device: torch.device | str, kind: str) -> Any:
    """Returns the event of a gradient with three bad elements in step 3, as a row of the frame."""
    model = net(device)
    optimizer = adamw(model.parameters())

    def spoil(gradient: Tensor) -> Tensor:
        three = torch.arange(gradient.numel(), device=gradient.device).reshape(gradient.shape) < 3
        return torch.where(three, getattr(math, kind), gradient)

    try:
        with gradwatch.watch(model, optimizer, on_nonfinite=policy) as watcher:
            for step in range(4):
                loss = loss_of(model, batch(step, device))
                if step == 2:
                    model[3].weight.register_hook(spoil)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    except gradwatch.NonFiniteGradientError:
        pass
    return watcher.history.events().iloc[0]


@check()
def events(place: Place) -> Found:
    """A NaN and an Inf have the name, step, micro-batch and kind that a CPU tells."""
    found = {}
    for kind in ("nan", "inf"):
        expected = _poisoned("record", "cpu", kind)
        with place.late():
            got = _poisoned("record", place.device, kind)
        for column in ("kind", "parameter", "step", "micro_batch"):
            require(got[column] == expected[column], f"{column}: {got[column]}")
        found[kind] = f"{got['kind']} in {got['parameter']}, step {got['step']}"
    return found


@check()
def event_counts(place: Place) -> Found:
    """NaN elements are counted by skip and raise, which look while the gradient is there."""
    with place.late():
        events = {p: _poisoned(p, place.device, "nan") for p in ("record", "skip", "raise")}
    found = {policy: int(event["nan_count"]) for policy, event in events.items()}
    counted = {policy: count for policy, count in found.items() if policy != "record"}
    # The backward spreads the three NaN elements to whatever comes after; the first has three.
    require(set(counted.values()) == {3}, f"nan_count: {found}")
    return found

"""What the suites on training loops share: a tiny model with its data, and what must be recorded of it."""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradwatch
from tests.support import float64

WAYS = ("named", "found")


def net(seed: int = 0) -> nn.Sequential:
    """Return a perceptron with two layers, the same for the same seed."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def sgd(*models: nn.Module, lr: float = 0.05) -> torch.optim.SGD:
    """Return plain SGD over all parameters of some models."""
    return torch.optim.SGD([p for model in models for p in model.parameters()], lr=lr)


def adam(*models: nn.Module, lr: float = 0.01) -> torch.optim.Adam:
    """Return Adam over all parameters of some models."""
    return torch.optim.Adam([p for model in models for p in model.parameters()], lr=lr)


def inputs(index: int, rows: int = 16, width: int = 4) -> Tensor:
    """Return random inputs ``[rows, width]``, the same for the same index."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1_000 + index))


def loss_of(model: nn.Module, index: int, scale: float = 1.0) -> Tensor:
    """Return the mean squared error ``[]`` of a model on batch `index`, times `scale`."""
    x = inputs(index)
    return (model(x) - x.sum(1, keepdim=True)).square().mean() * scale


def norm_of(parameters: Any) -> float:
    """Return the L2 norm of the gradients that are there, in float64."""
    norms = {str(i): float64.norm(p.grad) for i, p in enumerate(parameters) if p.grad is not None}
    return float64.total(norms)


def parameters_of(optimizer: Any) -> list[Tensor]:
    """Return all parameters of an optimizer, or of what wraps one."""
    while not hasattr(optimizer, "param_groups"):
        optimizer = optimizer.optimizer
    return [p for group in optimizer.param_groups for p in group["params"]]


@dataclass
class Row:
    """One row that must be in steps(); None where any value is right."""

    micro_batches: int | None
    norm: float | None
    outcome: str


@dataclass
class Expected:
    """What one watcher must record, written down by the loop itself.

    Attributes:
        tensors: The watched parameters.
        watcher: The watcher; None where the loop runs without one.
        rows: The rows of each optimizer, in the order of their first steps.
    """

    tensors: list[Tensor]
    watcher: gradwatch.Watcher | None = None
    rows: dict[int, list[Row]] = field(default_factory=dict)
    kept: list[Any] = field(default_factory=list)  # an id is that of one object while it lives

    def row(
        self,
        optimizer: Any = None,
        micro_batches: int | None = 1,
        outcome: str = "applied",
        norm: float | None = math.nan,
        scale: float = 1.0,
    ) -> None:
        """Expect a row; called before the clip and the step.

        Args:
            optimizer: The optimizer; None for a loop without one.
            micro_batches: How many; None where any number is right.
            outcome: Its `outcome`.
            norm: Its `grad_norm`: by default that of the gradients which are there now, over the
                watched parameters of the optimizer; None where any is right.
            scale: Loss scale of these gradients.
        """
        if norm is not None and math.isnan(norm):
            mine = self.tensors
            if optimizer is not None:
                held = {id(p) for p in parameters_of(optimizer)}
                mine = [tensor for tensor in mine if id(tensor) in held]
            norm = norm_of(mine) / scale
        self.kept.append(optimizer)
        self.rows.setdefault(id(optimizer), []).append(Row(micro_batches, norm, outcome))

    def differences(self) -> Iterator[str]:
        """Yield where the recorded rows are not those expected."""
        assert self.watcher is not None
        steps = self.watcher.history.steps().reset_index()
        groups = [group for _, group in steps.groupby("optimizer", sort=False)]
        expected = list(self.rows.values())
        lengths = [len(rows) for rows in expected]
        got = {label: len(group) for label, group in steps.groupby("optimizer", sort=False)}
        if list(got.values()) != lengths:
            yield f"expected {lengths} rows of the optimizers, in the order of their first steps, got {got}"
            return
        if (id(None) in self.rows) != ("none" in got):
            yield f"rows of 'none' are those of a loop without an optimizer, got {got}"
        for rows, group in zip(expected, groups, strict=True):
            yield from _differences(rows, group)


def _differences(rows: list[Row], group: Any) -> Iterator[str]:
    label = group["optimizer"].iloc[0]
    numbers = group["step"].tolist()
    if numbers != list(range(1, len(rows) + 1)):
        yield f"{label}: expected steps 1 to {len(rows)}, got {numbers}"
    for row, got in zip(rows, group.itertuples(), strict=True):
        where = f"{label}, step {got.step}:"
        if row.micro_batches not in (None, got.micro_batches):
            yield f"{where} expected {row.micro_batches} micro-batches, got {got.micro_batches}"
        if row.outcome != got.outcome:
            yield f"{where} expected outcome {row.outcome}, got {got.outcome}"
        if row.norm is not None and got.grad_norm != pytest.approx(row.norm, rel=1e-5, nan_ok=True):
            yield f"{where} expected grad_norm {row.norm:.8g}, got {got.grad_norm:.8g}"


@dataclass
class Watch:
    """Watches as a loop asks, in one of three ways: named, found or unwatched."""

    way: str
    runs: list[Expected] = field(default_factory=list)

    @contextlib.contextmanager
    def __call__(
        self, model: nn.Module | Mapping[str, Tensor], *optimizers: Any, **options: Any
    ) -> Iterator[Expected]:
        """Watch a model in a block, with its optimizers named in the order of their first steps."""
        whole = isinstance(model, nn.Module)
        run = Expected(list(model.parameters() if whole else model.values()))
        self.runs.append(run)
        if self.way == "unwatched":
            yield run
            return
        named = list(optimizers) if self.way == "named" else []
        first = named[0] if len(named) == 1 else named or None
        with gradwatch.watch(model, first, **options) as run.watcher:
            yield run


@contextlib.contextmanager
def warnings_of_gradwatch() -> Iterator[list[str]]:
    """Collect the messages of all GradwatchWarning of a block; let no other warning through."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
        messages += [
            str(one.message)
            for one in caught
            if issubclass(one.category, gradwatch.GradwatchWarning)
        ]


Loop = Callable[[Watch], Any]

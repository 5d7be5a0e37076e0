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
class Thrown:
    """One event `discarded`: gradients that no optimizer used."""

    step: int
    micro_batches: int
    norm: float
    bad_micro_batch: int


@dataclass
class Expected:
    """What one watcher must record, written down by the loop itself.

    Attributes:
        tensors: The watched parameters.
        watcher: The watcher; None where the loop runs without one.
        rows: The rows of each optimizer, in the order of their first steps.
        thrown: The events `discarded`.
    """

    tensors: list[Tensor]
    watcher: gradwatch.Watcher | None = None
    rows: dict[int, list[Row]] = field(default_factory=dict)
    thrown: list[Thrown] = field(default_factory=list)
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

    def throw(
        self,
        optimizer: Any = None,
        micro_batches: int = 1,
        bad_micro_batch: int = 0,
        scale: float = 1.0,
    ) -> None:
        """Expect an event `discarded`; called while the gradients are still there, before any clip.

        Args:
            optimizer: The optimizer that would have stepped.
            micro_batches: How many are thrown away.
            bad_micro_batch: The one in which a NaN began, counted from 1; 0 without a NaN.
            scale: Loss scale of these gradients.
        """
        norm = norm_of(self.tensors) / scale
        step = len(self.rows.get(id(optimizer), ())) + 1
        self.thrown.append(Thrown(step, micro_batches, norm, bad_micro_batch))

    def differences_of_thrown(self) -> Iterator[str]:
        """Yield where the events `discarded`, and the NaN before them, are not those expected."""
        assert self.watcher is not None
        events = self.watcher.events
        got = [event for event in events if event.kind == "discarded"]
        if len(got) != len(self.thrown):
            seen = [(event.kind, event.step) for event in events]
            yield f"expected {len(self.thrown)} events discarded, got {len(got)} of {seen}"
            return
        for thrown, event in zip(self.thrown, got, strict=True):
            where = f"discarded event of step {event.step}:"
            if (event.step, event.micro_batch) != (thrown.step, 0):
                yield f"{where} expected step {thrown.step}, micro_batch 0, got {event.micro_batch}"
            if event.value != pytest.approx(thrown.norm, rel=1e-5, nan_ok=True):
                yield f"{where} expected norm {thrown.norm:.8g}, got {event.value:.8g}"
            if (
                thrown.micro_batches > 1
                and f"{thrown.micro_batches} micro-batch" not in event.message
            ):
                yield f"{where} expected {thrown.micro_batches} micro-batches in {event.message!r}"
        told = [event for event in events if event.kind in ("nan", "discarded")]
        seen = [(e.kind, e.step, e.micro_batch, bool(e.parameter)) for e in told]
        wanted = []
        for thrown in self.thrown:
            if thrown.bad_micro_batch:
                wanted.append(("nan", thrown.step, thrown.bad_micro_batch, True))
            wanted.append(("discarded", thrown.step, 0, False))
        if [one[:3] for one in seen] != [one[:3] for one in wanted]:
            yield f"expected (kind, step, micro_batch) {[w[:3] for w in wanted]}, got {[s[:3] for s in seen]}"
        if any(kind == "nan" and not named for kind, _, _, named in seen):
            yield "a nan event names no parameter"

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


def watched(
    way: str, model: nn.Module | Mapping[str, Tensor], *optimizers: Any, **options: Any
) -> gradwatch.Watcher:
    """Return a watcher of a model whose optimizers are named or to be found."""
    named = list(optimizers) if way == "named" else []
    return gradwatch.watch(model, named[0] if len(named) == 1 else named or None, **options)


@dataclass
class Watch:
    """Watches as a loop asks, in one of three ways: named, found or unwatched."""

    way: str
    runs: list[Expected] = field(default_factory=list)
    refused: Exception | None = None

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
        with watched(self.way, model, *optimizers, **options) as run.watcher:
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

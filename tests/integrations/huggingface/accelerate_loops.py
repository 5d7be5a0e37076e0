"""Loops as Accelerate's users write them, and what each of their steps must be, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gradwatch
from tests.support import float64

FEATURES = 4


def fresh(**options: Any) -> Accelerator:
    """Make an accelerator on the CPU; Accelerate keeps one state per process otherwise."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    return Accelerator(cpu=True, **options)


def net(seed: int = 0) -> nn.Module:
    """Make a small network, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 1))


def data(examples: int = 26, batch: int = 4) -> DataLoader[Any]:
    """Make batches; with 26 examples, 7 of them, and the last one is short."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(examples, FEATURES, generator=generator)
    targets = torch.randn(examples, 1, generator=generator)
    return DataLoader(TensorDataset(inputs, targets), batch_size=batch)


def squared(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error."""
    return (output - target).square().mean()


@dataclass
class Expected:
    """What each step must be, computed apart.

    Attributes:
        before: Norms before the clip: in float64, of the saved weights and micro-batches.
        seen: The same of the gradients that were there.
        after: Norms of the gradients that the optimizer got, in float64.
        losses: Mean losses of the micro-batches, as the loop had them.
        micro_batches: Their numbers.
    """

    before: list[float] = field(default_factory=list)
    seen: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    micro_batches: list[int] = field(default_factory=list)
    _window: list[tuple[Tensor, Tensor, float]] = field(default_factory=list)

    def note(self, inputs: Tensor, targets: Tensor, loss: Tensor) -> None:
        """Note a micro-batch."""
        self._window.append((inputs.clone(), targets.clone(), loss.item()))

    def end_backwards(self, accelerator: Accelerator, model: nn.Module) -> None:
        """Compute the gradient again, before anybody clips it."""
        twin = net().double()
        plain = accelerator.unwrap_model(model, keep_torch_compile=False)
        twin.load_state_dict({name: t.double() for name, t in plain.state_dict().items()})
        for inputs, targets, _ in self._window:
            loss = squared(twin(inputs.double()), targets.double())
            (loss / accelerator.gradient_accumulation_steps).backward()
        self.before.append(float64.gradient_norm(twin))
        self.seen.append(float64.gradient_norm(model))
        self.losses.append(sum(loss for *_, loss in self._window) / len(self._window))
        self.micro_batches.append(len(self._window))
        self._window = []

    def end_clip(self, model: nn.Module) -> None:
        """Measure what the optimizer gets."""
        self.after.append(float64.gradient_norm(model))


@dataclass
class Run:
    """What a loop leaves."""

    watcher: Any
    expected: Expected
    weights: list[Tensor]
    model: nn.Module

    @property
    def steps(self) -> Any:
        return self.watcher.history.steps()


def clip_norm(accelerator: Accelerator, model: nn.Module) -> None:
    """Clip as most loops do."""
    accelerator.clip_grad_norm_(model.parameters(), 0.5)


def clip_value(accelerator: Accelerator, model: nn.Module) -> None:
    """Clip each element."""
    accelerator.clip_grad_value_(model.parameters(), 0.05)


def train(
    watch: dict[str, Any] | None,
    *,
    clip: Callable[[Accelerator, nn.Module], None] | None = clip_norm,
    before_prepare: bool = False,
    make_optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    make_model: Callable[[], nn.Module] = net,
    epochs: int = 2,
    change: Callable[[int, Tensor], Tensor] = lambda batch, inputs: inputs,
    sinks: Callable[[Accelerator], list[Any]] = lambda accelerator: [],
    after_step: Callable[[Accelerator, int, Tensor], None] = lambda accelerator, step, loss: None,
    **options: Any,
) -> Run:
    """Train by Accelerate's loop: prepare, accumulate, backward, clip, step, schedule.

    Args:
        watch: Options of `watch()`; None trains without it.
        clip: Clips where gradients are complete.
        before_prepare: Whether `watch()` comes before `prepare()`.
        make_optimizer: Makes the optimizer.
        make_model: Makes the model.
        epochs: Passes over the data.
        change: Changes the inputs of a batch, by its number.
        sinks: Makes sinks.
        after_step: Called after each step.
        **options: Those of the accelerator.
    """
    accelerator = fresh(**options)
    model, loader, expected = make_model(), data(), Expected()
    optimizer = make_optimizer(model.parameters(), lr=1e-2)

    def watcher() -> Any:
        return gradwatch.watch(model, optimizer, sinks=sinks(accelerator), **(watch or {}))

    watched = watcher() if watch is not None and before_prepare else None
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.StepLR(optimizer, 3))
    if watch is not None and not before_prepare:
        watched = watcher()
    batch = step = 0
    with watched or nullcontext():
        for _ in range(epochs):
            for given, targets in loader:
                inputs, batch = change(batch, given), batch + 1
                with accelerator.accumulate(model):
                    loss = squared(model(inputs), targets)
                    expected.note(inputs, targets, loss)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        expected.end_backwards(accelerator, model)
                        if clip is not None:
                            clip(accelerator, model)
                        expected.end_clip(model)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                if accelerator.sync_gradients:
                    step += 1
                    after_step(accelerator, step, loss.detach())
    weights = [copy.deepcopy(p.detach()) for p in model.parameters()]
    return Run(watched, expected, weights, model)


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Return whether two lists of weights are bit-identical."""
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

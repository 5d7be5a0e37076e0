"""A training loop that can do all that a setting says, with and without a watcher."""

import random
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import gradwatch
from tests.support.optimizers import IN_TWO_PARTS, make_optimizer, takes_a_closure
from tests.support.options import STATISTICS
from tests.support.state import state_of
from tests.support.zoo import SEED, make_case

from .covering import Row
from .layouts import ALONE, Layout
from .precisions import OF_THE_MODEL, PRECISIONS

STEPS = 12  # in which a scaler overflows, and grows again; see test_covering
DROPOUT = 0.2
MAX_NORM = 0.1
WATCHING: dict[str, dict[str, Any]] = {
    "named": {"named": True},
    "found": {"named": False},
    "statistics": {"named": True, "statistics": STATISTICS},
    "found_statistics": {"named": False, "statistics": STATISTICS, "every": 3},
}
OWN_CLIPS: dict[str, Callable[[list[Tensor]], object]] = {
    "clip": lambda parameters: nn.utils.clip_grad_norm_(parameters, MAX_NORM),
    "clip_far": lambda parameters: nn.utils.clip_grad_norm_(parameters, 1e6),
    "clip_value": lambda parameters: nn.utils.clip_grad_value_(parameters, 1e-3),
    "multiplied": lambda parameters: [p.grad.mul_(0.25) for p in parameters],
    "replaced": lambda parameters: [setattr(p, "grad", p.grad * 0.25) for p in parameters],
}
USUAL: Row = {
    "model": "mlp", "optimizer": "SGD", "precision": "float32", "micro_batches": "1",
    "own_clip": "no_clip", "zeroing": "to_none", "watching": "named", "watched": "wrapper",
}  # fmt: skip


class Loop:
    """A model in training.

    Attributes:
        model: As the loop calls it: wrapped, where it is spread over ranks.
        optimizer: The one that the loop steps.
        scaler: That of the loss, where the precision has one.
        watcher: None where nothing is watched.
        overflows: Steps that the scaler left out.
        losses: What each step returned, or each evaluation where step() returns nothing.
    """

    def __init__(
        self,
        setting: Row,
        *,
        watched: bool,
        layout: Layout = ALONE,
        rank: int = 0,
        dropout: float = DROPOUT,
        **options: Any,
    ) -> None:
        """Build the model, alike on every rank.

        Args:
            setting: Choices that are not the usual ones.
            watched: Whether there is a watcher.
            layout: How the model is spread over ranks.
            rank: Which of them this is.
            dropout: Probability that a dropout layer drops.
            **options: Further ones of `gradwatch.watch`.
        """
        self.setting = {**USUAL, **setting}
        self.layout = layout
        self.precision = {**PRECISIONS, **OF_THE_MODEL}[self.setting["precision"]]
        self.micro_batches = int(self.setting["micro_batches"])
        self.case = make_case(self.setting["model"], rank=rank // layout.copies, dropout=dropout)
        self.scaler = self.precision.scaler(layout.place.type)
        self.model = layout.wrap(self.precision.cast(self.case.model))
        self.optimizer = make_optimizer(self.setting["optimizer"], self.model.parameters())
        self.watcher = self._watch(options) if watched else None
        self.overflows = 0
        self.losses: list[Tensor] = []

    def run(self, steps: int = STEPS) -> dict[str, Any]:
        """Train from fresh seeds, and return the state at the end."""
        torch.manual_seed(SEED)
        random.seed(SEED)
        np.random.seed(SEED)
        with self.watcher or nullcontext():
            for step in range(steps):
                self.step(step)
        return {**state_of(self.model, *self._optimizers()), "losses": self.losses}

    def steps_seen(self) -> int:
        """Return how many steps of an optimizer the watcher has recorded."""
        return int((self.watcher.history.steps()["optimizer"] != "none").sum())

    def step(self, step: int) -> None:
        """Train on the micro-batches of one step."""
        optimizer, name = self.optimizer, self.setting["optimizer"]
        if takes_a_closure(name):
            self.losses.append(optimizer.step(lambda: self.evaluate(step)))
            return
        self.losses.append(self.evaluate(step))
        if name in IN_TWO_PARTS:
            optimizer.first_step()
            self.evaluate(step)
            optimizer.second_step()
        elif self.scaler is not None:
            before = self.scaler.get_scale()
            self.scaler.step(optimizer)
            self.scaler.update()
            self.overflows += self.scaler.get_scale() < before
        else:
            optimizer.step()

    def evaluate(self, step: int) -> Tensor:
        """Compute the gradients of one step, and clip them where the loop does; return the loss."""
        self.optimizer.zero_grad(set_to_none=self.setting["zeroing"] == "to_none")
        losses = []
        for number in range(self.micro_batches):
            last = number == self.micro_batches - 1
            with self.layout.micro_batch(self.model, last):
                losses.append(self.loss(step * self.micro_batches + number))
                loss = losses[-1] / self.micro_batches
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        self.look_at_gradients(step)
        if self.setting["own_clip"] in OWN_CLIPS:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            OWN_CLIPS[self.setting["own_clip"]](list(self.model.parameters()))
        return self._mean_over_ranks(torch.stack(losses).mean().detach())

    def look_at_gradients(self, step: int) -> None:
        """Do nothing; called where the gradients of a step are complete and nobody clipped them."""

    def loss(self, index: int) -> Tensor:
        """Return the loss of one micro-batch."""
        batch = tuple(self.precision.of(tensor) for tensor in self.case.batch(index))
        batch = tuple(self.layout.place.tensor(tensor) for tensor in batch)
        with self.precision.forward(self.layout.place.type):
            return self.case.loss(self.model, batch)

    def _mean_over_ranks(self, loss: Tensor) -> Tensor:
        """Return the mean, so that an optimizer that looks at the loss decides alike on all ranks."""
        if self.layout.ranks > 1 and takes_a_closure(self.setting["optimizer"]):
            dist.all_reduce(loss)
            loss /= self.layout.ranks
        return loss

    def _watch(self, further: dict[str, Any]) -> gradwatch.Watcher:
        options = {**WATCHING[self.setting["watching"]], "scaler": self.scaler, **further}
        # One whose step() is never called has no steps: the one that it calls has.
        whose = self._optimizers()[-1 if self.setting["optimizer"] in IN_TWO_PARTS else 0]
        model = self.model if self.setting["watched"] == "wrapper" else self.model.module
        return gradwatch.watch(model, whose if options.pop("named") else None, **options)

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        base = getattr(self.optimizer, "base", None)
        return [self.optimizer] if base is None else [self.optimizer, base]

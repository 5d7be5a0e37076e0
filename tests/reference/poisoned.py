"""Trainings in which one rank meets NaN at one step, and the same without that step."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import gradwatch
from tests.neutrality.covering import Row
from tests.neutrality.layouts import ALONE, Layout
from tests.neutrality.loop import Loop
from tests.neutrality.ranked import layout_of
from tests.support.state import differences, pieces

STEPS, POISONED = 6, 3


class PoisonedLoop(Loop):
    """A loop whose last rank finds NaN in the first micro-batch of one step.

    Attributes:
        poison: Whether the "loss" is NaN, or one element of one "shard" of a gradient.
    """

    def __init__(
        self, *arguments: Any, poison: str = "loss", rank: int = 0, **options: Any
    ) -> None:
        super().__init__(*arguments, rank=rank, dropout=0.0, **options)
        self._mine = rank == self.layout.ranks - 1
        self._step = 0
        self.poison = poison
        if poison == "shard":
            first = next(p for p in self.model.parameters() if p.requires_grad)
            first.register_post_accumulate_grad_hook(self._spoil)

    def step(self, step: int) -> None:
        """Train on one step."""
        self._step = step
        super().step(step)

    def loss(self, index: int) -> Tensor:
        """Return the loss of one micro-batch, be it a bad one."""
        bad = self.poison == "loss" and self._mine and index == POISONED * self.micro_batches
        return super().loss(index) * (math.nan if bad else 1.0)

    def _spoil(self, parameter: Tensor) -> None:
        if self._step == POISONED and _holds_the_last_part(parameter.grad):
            with torch.no_grad():
                parameter.grad.to_local().view(-1)[0] = math.nan


def _holds_the_last_part(tensor: Tensor) -> bool:
    """Return whether this rank holds a copy of the last part of a split tensor."""
    mesh = tensor.device_mesh
    dimensions = zip(mesh.get_coordinate(), mesh.shape, tensor.placements, strict=True)
    return all(place == size - 1 for place, size, placement in dimensions if placement.is_shard())


class LeftOutLoop(Loop):
    """A loop that does not come to that step."""

    def step(self, step: int) -> None:
        """Train on one step, unless it is the bad one."""
        if step != POISONED:
            super().step(step)


def skip(
    setting: Row, layout: Layout = ALONE, rank: int = 0, poison: str = "loss"
) -> dict[str, Any]:
    """Train with the bad step skipped and with it left out; return where weights and state differ."""
    where = {"layout": layout, "rank": rank}
    watched = PoisonedLoop(setting, watched=True, poison=poison, on_nonfinite="skip", **where)
    bare = LeftOutLoop(setting, watched=False, dropout=0.0, **where)
    with_it, without = watched.run(STEPS), bare.run(STEPS)
    steps = watched.watcher.history.steps()
    kept = ("parameters", "optimizers")
    return {
        "differences": [text for key in kept for text in differences(without[key], with_it[key])],
        "outcomes": steps["outcome"].tolist(),
        "norms": steps["grad_norm"].tolist(),
        "nonfinite_parameters": steps["nonfinite_parameters"].tolist(),
        "kinds": sorted({event.kind for event in watched.watcher.events}),
    }


def refuse(setting: Row, layout: Layout = ALONE, rank: int = 0) -> dict[str, Any]:
    """Train up to the error; return when it came, and whether the weights are those of before."""
    where = {"layout": layout, "rank": rank}
    watched = PoisonedLoop(setting, watched=True, on_nonfinite="raise", **where)
    bare = LeftOutLoop(setting, watched=False, dropout=0.0, **where)
    bare.run(POISONED)
    try:
        watched.run(STEPS)
    except gradwatch.NonFiniteGradientError as error:
        weights = [pieces(dict(loop.model.named_parameters())) for loop in (bare, watched)]
        return {"step": error.step, "differences": list(differences(*weights))}
    return {"step": None}


def skip_on_rank(setting: Row, poison: str = "loss") -> dict[str, Any]:
    """Do the first on one of several ranks."""
    return skip(setting, layout_of(setting), dist.get_rank(), poison)


def refuse_on_rank(setting: Row) -> dict[str, Any]:
    """Do the second on one of several ranks."""
    return refuse(setting, layout_of(setting), dist.get_rank())

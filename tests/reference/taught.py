"""A watched training beside which a float64 model computes what the records must say."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.neutrality.covering import Row
from tests.neutrality.layouts import ALONE, Layout
from tests.neutrality.loop import MAX_NORM, Loop
from tests.neutrality.ranked import layout_of

from .double import DoubleModel, norms, widen


class TaughtLoop(Loop):
    """A loop that also writes down, for each step, what the record of it must be.

    The float64 model is given the weights anew before each evaluation, so that nothing drifts.

    Attributes:
        expected: What each step must be recorded as; that of its last evaluation, if it has more.
    """

    def __init__(self, setting: Row, *, layout: Layout = ALONE, rank: int = 0) -> None:
        clip = {"clip": MAX_NORM} if setting.get("own_clip") == "watch_clip" else {}
        super().__init__(setting, watched=True, layout=layout, rank=rank, dropout=0.0, **clip)
        self.expected: dict[int, dict[str, Any]] = {}
        self._rank = rank // layout.copies
        self._data_ranks = range(layout.ranks // layout.copies)
        self._double = DoubleModel(self.setting["model"])

    def step(self, step: int) -> None:
        """Train on one step, and see whether the scaler let it through."""
        overflows = self.overflows
        super().step(step)
        skipped = self.overflows > overflows
        self.expected[step]["outcome"] = "skipped_scaler" if skipped else "applied"

    def evaluate(self, step: int) -> Tensor:
        """Compute the gradients in float64 too."""
        self._double.take(self._whole(dict(self.inner.named_parameters())))
        numbers = [step * self.micro_batches + i for i in range(self.micro_batches)]
        everywhere = [(rank, number) for rank in self._data_ranks for number in numbers]
        share = 1 / self.micro_batches
        self.expected[step] = {
            "double": norms(self._double.gradients(everywhere, share / len(self._data_ranks))),
            "local": norms(self._local(numbers, share)),
            "loss_scale": 1.0 if self.scaler is None else self.scaler.get_scale(),
        }
        return super().evaluate(step)

    def look_at_gradients(self, step: int) -> None:
        """Measure the gradients that are really there, in true units."""
        parameters = self.inner.named_parameters()
        there = self._whole({name: p.grad for name, p in parameters if p.grad is not None})
        scale = self.expected[step]["loss_scale"]
        self.expected[step]["gradients"] = norms({n: g / scale for n, g in there.items()})

    @property
    def inner(self) -> torch.nn.Module:
        """The model without its wrapper."""
        return getattr(self.model, "module", self.model)

    def seen(self) -> dict[str, Any]:
        """Return what was recorded and what was expected, step by step, in plain numbers."""
        history = self.watcher.history
        steps = history.steps()
        steps = steps[steps["optimizer"] != "none"]
        rows = [{c: row[c] for c in steps.columns} for _, row in steps.iterrows()]
        frame = history.parameters()
        for step, row in zip(steps.index, rows, strict=True):
            of_step = frame[frame["step"] == step]
            row["parameters"] = dict(zip(of_step["parameter"], of_step["grad_norm"], strict=True))
        return {"recorded": rows, "expected": list(self.expected.values())}

    def _local(self, numbers: list[int], share: float) -> dict[str, Tensor]:
        """Return what this rank holds before the last reduction: what came reduced, and its own."""
        reduced = [] if self.setting.get("sync") != "every_sync" else numbers[:-1]
        everywhere = [(rank, number) for rank in self._data_ranks for number in reduced]
        before = self._double.gradients(everywhere, share / len(self._data_ranks))
        own = self._double.gradients(
            [(self._rank, number) for number in numbers if number not in reduced], share
        )
        return {name: own[name] + before.get(name, 0.0) for name in own}

    def _whole(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: widen(tensor) for name, tensor in tensors.items()}


def train(setting: Row, layout: Layout, steps: int, rank: int = 0) -> dict[str, Any]:
    """Train, and return what was recorded beside what was expected."""
    loop = TaughtLoop(setting, layout=layout, rank=rank)
    loop.run(steps)
    return loop.seen()


def train_on_rank(setting: Row, steps: int) -> dict[str, Any]:
    """Do the same on one of several ranks."""
    return train(setting, layout_of(setting), steps, dist.get_rank())

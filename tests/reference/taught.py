"""A watched training beside which a float64 model computes what the records must say."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import gradwatch
from tests.neutrality.covering import Row
from tests.neutrality.layouts import ALONE, Layout
from tests.neutrality.loop import MAX_NORM, Loop
from tests.neutrality.ranked import layout_of
from tests.support.float64 import gradients, norms, widen

from .double import DoubleModel

MAX_NORMS = {1.0: 1.0, 2.0: MAX_NORM, math.inf: 0.02}
FAR = 1e6  # no gradient is as long


def norm_type_of(setting: Row) -> float:
    """Return the p of the norm that a setting asks for."""
    return float(setting.get("norm_type", "2"))


class TaughtLoop(Loop):
    """A loop that also writes down, for each step, what the record of it must be.

    The float64 model is given the weights anew before each evaluation, so that nothing drifts.

    Attributes:
        expected: What each step must be recorded as; that of its last evaluation, if it has more.
    """

    def __init__(self, setting: Row, *, layout: Layout = ALONE, rank: int = 0) -> None:
        super().__init__(
            setting, watched=True, layout=layout, rank=rank, dropout=0.0, **self._options(setting)
        )
        self._p = norm_type_of(setting)
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
        if self.scaler is None and "fused" not in self.setting["optimizer"]:
            # A scaler, and a fused optimizer that clips, leave other gradients than they step with.
            self.expected[step]["left"] = norms(gradients(self.inner), self._p)

    def evaluate(self, step: int) -> Tensor:
        """Compute the gradients in float64 too."""
        self.expect(step)
        return super().evaluate(step)

    def expect(self, step: int) -> None:
        """Compute in float64 what the gradients of a step are going to be."""
        self._double.take(self._whole(dict(self.inner.named_parameters())))
        numbers = [step * self.micro_batches + i for i in range(self.micro_batches)]
        everywhere = [(rank, number) for rank in self._data_ranks for number in numbers]
        share = 1 / self.micro_batches
        self.expected[step] = {
            "double": norms(
                self._double.gradients(everywhere, share / len(self._data_ranks)), self._p
            ),
            "local": norms(self._local(numbers, share), self._p),
            "loss_scale": 1.0 if self.scaler is None else self.scaler.get_scale(),
            "left": None,
        }

    def look_at_gradients(self, step: int) -> None:
        """Measure the gradients that are really there, in true units."""
        there = self._whole(gradients(self.inner))
        scale = self.expected[step]["loss_scale"]
        self.expected[step]["gradients"] = norms({n: g / scale for n, g in there.items()}, self._p)

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
            for key, column in (
                ("parameters", "grad_norm"),
                ("clipped_parameters", "grad_norm_clipped"),
            ):
                row[key] = dict(zip(of_step["parameter"], of_step[column], strict=True))
            row["number"] = step
        return {"recorded": rows, "expected": list(self.expected.values())}

    @staticmethod
    def _options(setting: Row) -> dict[str, Any]:
        """Return the options of a watcher that clips, or that measures in another norm."""
        p, clips = norm_type_of(setting), setting.get("own_clip") == "watch_clip"
        if p == 2:
            return {"clip": MAX_NORM} if clips else {}
        return {"clip": gradwatch.ClipByNorm(MAX_NORMS[p] if clips else math.inf, norm_type=p)}

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


class ManagedLoop(TaughtLoop):
    """The same training, whose backwards and steps are the watcher's."""

    def step(self, step: int) -> None:
        """Train on one window; only its last micro-batch steps."""
        self.expect(step)
        self.expected[step]["gradients"] = None  # theirs are in the making until the very step
        applied = []
        for number in range(self.micro_batches):
            self.watcher.backward(self.loss(step * self.micro_batches + number))
            applied.append(self.watcher.step())
        assert applied == [False] * (self.micro_batches - 1) + [True]
        self.expected[step]["outcome"] = "applied"

    @staticmethod
    def _options(setting: Row) -> dict[str, Any]:
        clip = MAX_NORM if setting["own_clip"] == "watch_clip" else FAR
        return {"clip": clip, "accumulate": int(setting["micro_batches"])}


def train(setting: Row, layout: Layout, steps: int, rank: int = 0) -> dict[str, Any]:
    """Train, and return what was recorded beside what was expected."""
    kind = ManagedLoop if setting.get("managed") == "managed" else TaughtLoop
    loop = kind(setting, layout=layout, rank=rank)
    loop.run(steps)
    return loop.seen()


def train_on_rank(setting: Row, steps: int) -> dict[str, Any]:
    """Do the same on one of several ranks."""
    return train(setting, layout_of(setting), steps, dist.get_rank())

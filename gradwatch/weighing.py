"""Weighing: what the micro-batches of a window weigh, and what they tell about the noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradwatch.control.accumulation import AccumulationPlan
from gradwatch.control.noise_sample import (
    MicroBatch,
    NoiseSample,
    WindowSums,
    sample_of_all,
    sample_of_first,
    sample_of_rank,
)
from gradwatch.control.noise_scale import NoiseScaleEstimator
from gradwatch.control.window import Window
from gradwatch.observe.data_parallel import DataParallel
from gradwatch.observe.measurement import Measurement
from gradwatch.observe.model_hooks import ModelHooks
from gradwatch.observe.readings import Number, number_of, operand

Losses = list[tuple[Number, Number]]

ONE_MICRO_BATCH = (
    "a step has one micro-batch on one process, and there is nothing to compare it with: "
    "accumulate 2 or more"
)
NOT_L2 = "the clip works with another norm than L2, so that is the one measured"
SHARDED = "sharded parameters do not show what a micro-batch adds to their gradients"
REDUCED_EACH = (
    "every micro-batch was reduced over the ranks by itself, so that no gradient was of one rank: "
    "use watcher.backward(), or no_sync() for all but the last"
)
NOT_ONE_RANK = "this rank's own gradients were not seen before they were averaged over the ranks"
NOT_SEEN = "the gradient of the first micro-batch was not measured by itself"


class Weighing:
    """Weighs the windows of one optimizer.

    Attributes:
        noise: Its gradient noise scale.
        silent: Why the newest window said nothing about the noise; empty where it did.
        sample: What it said; None where it said nothing.
    """

    def __init__(
        self, hooks: ModelHooks, accumulation: AccumulationPlan, data_parallel: DataParallel | None
    ) -> None:
        """Starts with no window.

        Args:
            hooks: See what a micro-batch adds, and each rank's own gradients.
            accumulation: How many micro-batches a window has.
            data_parallel: The ranks that average their gradients; None where there is one only.
        """
        self.noise = NoiseScaleEstimator()
        self.silent = ""
        self.sample: NoiseSample | None = None
        self._weight: Number | None = None
        self._hooks = hooks
        self._accumulation = accumulation
        self._data_parallel = data_parallel
        self._reduced = 0

    def weight(self, window: Window) -> Number:
        """Returns the weight of a window, of all ranks where they were asked."""
        return window.weight if self._weight is None else self._weight

    def reset(self) -> None:
        """Forgets what was said about a window: its step is over, or another one begins."""
        self.sample = self._weight = None

    def note(self, window: Window, weight: Number, measurement: Measurement | None) -> None:
        """Takes note of a backward that the window has just taken in.

        Args:
            window: The window.
            weight: Weight of the micro-batch.
            measurement: The gradients as they are now; None where they cannot be seen.
        """
        count, hooks = len(window.filled), self._hooks
        if count == 1 and hooks.local is None and not hooks.added.watching:
            window.noted = [MicroBatch(weight, None if measurement is None else measurement.total)]
            return
        first, again = count == 1, count == len(window.noted)
        self._reduced = 0 if first else self._reduced
        own, added = self.own_norm(window), None
        self._reduced += own is not None
        if first or not again:  # a nested backward adds to a micro-batch in parts
            added = hooks.added.total(window.indices)
        if added is None and first:
            added = own
        norm = None if added is None else number_of(added)
        if norm is None and first and measurement is not None:
            norm = measurement.total
        window.noted = [*window.noted[: count - 1], MicroBatch(weight, norm)]

    def own_norm(self, window: Window) -> Tensor | None:
        """Returns the norm of this rank's own gradients before the newest reduction, if any."""
        local = self._hooks.local
        return None if local is None else local.total(window.indices)

    def weigh(self, window: Window, losses: Losses, scale: Number) -> Losses:
        """Adds a window up, before its step.

        Works out what the gradients lack to be the mean over all micro-batches of all ranks, and
        what they tell about the noise.

        Args:
            window: The window.
            losses: Its losses and their weights on this rank.
            scale: The loss scale at its last backward.

        Returns:
            The losses: one, of all ranks where they were asked.
        """
        self.reset()
        ranks = None
        if window.divisor is not None or self._accumulation.by_noise:
            ranks = self._data_parallel  # but not in a loop that is only watched
        alone = len(window.noted) < 2 and self._data_parallel is None
        if not window.noted or (alone and window.divisor is None):
            self.silent = ONE_MICRO_BATCH
            return losses
        sums = WindowSums.of(window.noted, losses)
        if ranks is not None:
            sums = sums.over_ranks(ranks, window.device)
            losses = [(_mean_loss(sums), 1.0)] if losses else []
        self._weight = sums.weight
        weight, count = _nonzero(operand(sums.weight)), 1 if ranks is None else ranks.ranks
        divisor = window.divisor
        if divisor is None:  # the loop has made a mean of it itself
            divisor = number_of(weight / count)
        else:
            window.correction = number_of(operand(divisor) * count / weight)
        self.sample, self.silent = self._sample(window, _Added(sums, ranks, divisor, scale))
        return losses

    def _sample(self, window: Window, added: _Added) -> tuple[NoiseSample | None, str]:
        if window.norm_type != 2.0:
            return None, NOT_L2
        if window.shards is not None:
            return None, SHARDED
        if added.ranks is None and self._data_parallel is not None:
            return self._sample_of_rank(window, self._data_parallel, added.scale)
        if added.ranks is None and len(window.noted) < 2:
            return None, ONE_MICRO_BATCH
        units = window.units or len(window.noted)
        sample = sample_of_all(added.sums, added.divisor, added.scale, units)
        if sample is not None and window.units:  # a short last window says nothing of the next one
            sample = sample.of_full_window(self._accumulation.micro_batches)
        if sample is None and added.ranks is None:
            sample = sample_of_first(window.noted, added.divisor, added.scale)
        return sample, "" if sample is not None else NOT_SEEN

    def _sample_of_rank(
        self, window: Window, ranks: DataParallel, scale: Number
    ) -> tuple[NoiseSample | None, str]:
        own, units = self.own_norm(window), window.units or len(window.noted)
        if own is None:
            return None, NOT_ONE_RANK
        if self._reduced != 1:
            return None, REDUCED_EACH
        return sample_of_rank(own, window.weight, ranks.ranks, scale, units), ""


@dataclass(frozen=True, slots=True)
class _Added:
    """A window that has been added up, over which ranks, and what the sums are to be read with."""

    sums: WindowSums
    ranks: DataParallel | None
    divisor: Number
    scale: Number


def _mean_loss(sums: WindowSums) -> Number:
    return number_of(operand(sums.loss) / _nonzero(operand(sums.weight)))


def _nonzero(weight: float | Tensor) -> float | Tensor:
    """Returns a weight to divide by: 1 for a window of nothing, whose gradients are all zero."""
    if isinstance(weight, Tensor):
        return torch.where(weight > 0, weight, 1.0)
    return weight if weight > 0 else 1.0

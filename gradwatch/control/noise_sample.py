"""NoiseSample: what the micro-batches of one window tell about the noise of the gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from gradwatch.observe.data_parallel import DataParallel
from gradwatch.observe.readings import Number, Reading, number, number_of, operand


class MicroBatch(NamedTuple):
    """One micro-batch of a window.

    Attributes:
        weight: Its weight.
        norm: L2 norm of what it added to the gradients, weighed and scaled as they are; None where
            that is not known.
    """

    weight: Number
    norm: Number | None


@dataclass(frozen=True, slots=True)
class WindowSums:
    """What adds up over the micro-batches of a window, and over the ranks.

    Attributes:
        weight: Sum of the weights.
        count: Micro-batches whose weight is not zero.
        spread: Sum of the squared norms, each over its weight; NaN where one is not known.
        loss: Sum of the losses, each times its weight.
    """

    weight: Number
    count: Number
    spread: Number
    loss: Number

    @classmethod
    def of(
        cls, micro_batches: Sequence[MicroBatch], losses: Sequence[tuple[Number, Number]]
    ) -> WindowSums:
        """Adds up the micro-batches of this rank.

        Args:
            micro_batches: What is known of each.
            losses: Their losses and weights.
        """
        weights = [operand(one.weight) for one in micro_batches]
        return cls(
            weight=number_of(sum(weights)),
            count=number_of(sum(weight > 0 for weight in weights)),
            spread=number_of(sum(map(_spread, micro_batches))),
            loss=number_of(sum(operand(loss) * operand(weight) for loss, weight in losses)),
        )

    def over_ranks(self, data_parallel: DataParallel, device: torch.device) -> WindowSums:
        """Adds up the sums of all ranks, in one all-reduce.

        Args:
            data_parallel: The ranks.
            device: Where their process group works.
        """
        parts = map(operand, (self.weight, self.count, self.spread, self.loss))
        payload = torch.stack([_on(device, part) for part in parts])
        return WindowSums(*map(number_of, data_parallel.add_up_(payload).unbind()))


@dataclass(frozen=True, slots=True)
class NoiseSample:
    """The gradient of a small batch beside that of a large one.

    Attributes:
        small_sq: Squared norm of the mean gradient of the small one, in the unit of the loss scale.
        small: Its size: a sum of weights.
        large: The size of the large one, which is the whole window.
        scale: The loss scale that ``small_sq`` carries twice.
        per_micro_batch: What one more micro-batch on every rank adds to ``large``.
        micro_batches: How many a window has, where that is another number than this one had.
    """

    small_sq: Number
    small: Number
    large: Number
    scale: Number
    per_micro_batch: Number
    micro_batches: int | None = None

    def of_full_window(self, micro_batches: int) -> NoiseSample:
        """Returns the sample with the number of micro-batches that a full window has."""
        return replace(self, micro_batches=micro_batches)

    def batch(self) -> float:
        """The size of a full window."""
        if self.micro_batches is None:
            return number(self.large)
        return number(self.per_micro_batch) * self.micro_batches

    def readings(self) -> list[Reading]:
        """Lists what must be read before the numbers can be."""
        numbers = (self.small_sq, self.small, self.large, self.scale, self.per_micro_batch)
        return [one for one in numbers if isinstance(one, Reading)]

    def small_norm_sq(self) -> float:
        """The squared norm of the mean gradient of the small batch, in true units."""
        return number(self.small_sq) / number(self.scale) ** 2


def sample_of_all(
    sums: WindowSums, divisor: Number, scale: Number, batches: int
) -> NoiseSample | None:
    """Makes a sample of the norms of all micro-batches.

    For micro-batches of unequal weight :math:`w_i` the mean of their squared norms is weighed by
    :math:`w_i / W`, and their size is :math:`W / k`: then the estimates of
    :func:`~gradwatch.control.noise_scale.noise_terms` have no bias.

    Args:
        sums: Over all micro-batches, of all ranks.
        divisor: What each loss was divided by, after it was multiplied with its weight.
        scale: The loss scale.
        batches: What the window counts as, in the unit of ``watch(accumulate=)``.

    Returns:
        The sample; None where a norm is not known, or nothing weighs anything.
    """
    if isinstance(sums.spread, float) and math.isnan(sums.spread):
        return None
    weight, count, each = operand(sums.weight), operand(sums.count), operand(divisor)
    if isinstance(weight, float) and weight == 0.0:
        return None
    return NoiseSample(
        small_sq=number_of(each * (each * operand(sums.spread) / weight)),
        small=number_of(weight / count),
        large=sums.weight,
        scale=scale,
        per_micro_batch=number_of(weight / batches),
    )


def sample_of_first(
    micro_batches: Sequence[MicroBatch], divisor: Number, scale: Number
) -> NoiseSample | None:
    """Makes a sample of the norm of the first micro-batch, where only that is known.

    Args:
        micro_batches: Those of the window.
        divisor: As for :func:`sample_of_all`.
        scale: The loss scale.

    Returns:
        The sample; None where that norm is not known either.
    """
    first = micro_batches[0]
    weight, small = sum(operand(one.weight) for one in micro_batches), operand(first.weight)
    if first.norm is None or (isinstance(small, float) and small == 0.0):
        return None
    mean = operand(divisor) * operand(first.norm) / small
    return NoiseSample(
        small_sq=number_of(mean * mean),
        small=first.weight,
        large=number_of(weight),
        scale=scale,
        per_micro_batch=number_of(weight / len(micro_batches)),
    )


def sample_of_rank(
    own_norm: Tensor, weight: Number, ranks: int, scale: Number, batches: int
) -> NoiseSample:
    """Makes a sample of this rank's own gradient, before it became the mean over the ranks.

    Args:
        own_norm: Norm of the whole window on this rank: tensor ``[]``.
        weight: Weight of the window on this rank, taken to be the same on every other.
        ranks: How many there are.
        scale: The loss scale.
        batches: As for :func:`sample_of_all`.
    """
    large = operand(weight) * ranks
    return NoiseSample(
        small_sq=number_of(own_norm.double().square()),
        small=weight,
        large=number_of(large),
        scale=scale,
        per_micro_batch=number_of(large / batches),
    )


def _spread(one: MicroBatch) -> float | Tensor:
    if one.norm is None:
        return math.nan
    norm, weight = operand(one.norm), operand(one.weight)
    squared = norm.double() ** 2 if isinstance(norm, Tensor) else norm**2
    if isinstance(weight, Tensor):
        return torch.where(weight > 0, squared / weight, 0.0)
    return squared / weight if weight > 0 else 0.0


def _on(device: torch.device, part: float | Tensor) -> Tensor:
    return torch.as_tensor(part, dtype=torch.float64).to(device)

"""Agreement: the numbers of one step over all ranks, where each holds a part of the gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradwatch.observe.measurement import Measurement
from gradwatch.observe.nonfinite import NonFiniteCount
from gradwatch.observe.norms import total_norm
from gradwatch.observe.offender import Offender
from gradwatch.observe.readings import Reading
from gradwatch.observe.shards import Exchange, Shards


@dataclass(frozen=True, slots=True)
class Sides:
    """Both sides of the clip, and what went bad between.

    Attributes:
        before: The measurement before the clip.
        after: The measurement when the step begins.
        offender: The first parameter that went bad; None while all is finite, or while the
            numbers are on their way from the device.
        nonfinite: How many parameters were bad.
    """

    before: Measurement
    after: Measurement
    offender: Offender | None
    nonfinite: int


def agree(
    shards: Shards,
    mine: Sides,
    pending: dict[int, Tensor],
    norm_type: float,
    ride: Callable[[Exchange], None] = lambda exchange: None,
) -> Sides:
    """Turns what this rank measured on its parts into numbers of the whole gradients.

    A rank that has no gradient, or an empty part, takes part all the same.

    Args:
        shards: The sharded parameters.
        mine: What this rank measured.
        pending: What it holds of gradients that are sums which nobody has taken yet, by index.
        norm_type: The p of the norms.
        ride: Adds further numbers to the exchange.

    Returns:
        The same on every rank.
    """
    before, after = mine.before, mine.after
    exchange = Exchange(shards, after.total.tensor.device)
    rows = [_Powers(exchange, m, norm_type) for m in (before, after)]
    there = shards.spread(after.indices, torch.ones_like(after.norms.tensor))
    presence = exchange.add_up(there)
    note = exchange.tell(_note(mine, there))
    exchange.complete(pending)
    ride(exchange)
    exchange.run()
    indices = list(after.indices)
    if after.total.at_hand:
        indices = torch.nonzero(exchange.total(presence)).flatten().tolist()
    whole = [row.norms() for row in rows]
    for index in pending:
        norm = total_norm(exchange.completed(index), norm_type)
        whole[1][index] = norm
        whole[0][index] = norm * _ratio(before, after, index)
    overflowed = before.overflowed or after.overflowed
    sides = [_measurement(shards, indices, row, norm_type, overflowed) for row in whole]
    agreed = replace(mine, before=sides[0], after=sides[1])
    return _with_offender(agreed, exchange.told(note)) if after.total.at_hand else agreed


class _Powers:
    """A row of norms as numbers that can be added up, or compared, over ranks."""

    def __init__(self, exchange: Exchange, measurement: Measurement, norm_type: float) -> None:
        self._exchange = exchange
        self._p = norm_type
        row = exchange.shards.spread(measurement.indices, measurement.norms.tensor)
        maximum = math.isinf(norm_type)
        self._ticket = exchange.tell(row) if maximum else exchange.add_up(row.pow(norm_type))

    def norms(self) -> Tensor:
        if math.isinf(self._p):
            return self._exchange.told(self._ticket).amax(0)
        return self._exchange.total(self._ticket).pow(1 / self._p)


def _measurement(
    shards: Shards, indices: list[int], row: Tensor, norm_type: float, overflowed: bool
) -> Measurement:
    norms = row[shards.places(indices, row.device)]
    wide = Reading(total_norm(norms, norm_type))
    total = Reading(wide.tensor.to(shards.dtype))
    if wide.at_hand and (overflowed or math.isfinite(wide.value())):
        overflowed = overflowed or math.isinf(total.value())
    if overflowed:
        return Measurement(indices, Reading(norms), wide, overflowed=math.isfinite(wide.value()))
    return Measurement(indices, Reading(norms.to(shards.dtype)), total)


def _ratio(before: Measurement, after: Measurement, index: int) -> Tensor:
    """Returns how much larger a gradient was before the loop changed it, on this rank's share."""
    new = after.norms.tensor[after.indices.index(index)]
    if index not in before.indices:
        return torch.ones_like(new)
    old = before.norms.tensor[before.indices.index(index)]
    return torch.where(new > 0, old / new, torch.ones_like(new))


def _note(mine: Sides, like: Tensor) -> Tensor:
    first = mine.offender
    if first is None or first.counts is None:
        return like.new_zeros(6)
    facts = [first.micro_batch, first.place, first.index, first.norm, *first.counts]
    return like.new_tensor(facts)


def _with_offender(agreed: Sides, told: Tensor) -> Sides:
    """Names the first parameter that went bad on any rank, and counts its bad elements on all."""
    seen = [note for note in told.tolist() if note[0] > 0]
    bad = {i for m in (agreed.before, agreed.after) for i in m.nonfinite_indices()}
    if not seen:
        return replace(agreed, nonfinite=len(bad))
    micro_batch, place, index, norm, *_ = min(seen)
    same = [note for note in seen if (note[0], note[2]) == (micro_batch, index)]
    counts = NonFiniteCount(int(sum(n[4] for n in same)), int(sum(n[5] for n in same)))
    offender = Offender(int(index), int(micro_batch), norm, counts, int(place))
    return replace(agreed, offender=offender, nonfinite=max(len(bad), 1))

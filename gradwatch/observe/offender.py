"""Offender: the parameter whose gradient went bad first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from gradwatch.observe.measurement import Measurement
from gradwatch.observe.nonfinite import NonFiniteCount, count_nonfinite


@dataclass(frozen=True, slots=True)
class Offender:
    """The first parameter in backward order whose gradient went bad in a window.

    Attributes:
        index: Its index in the parameter table.
        micro_batch: The micro-batch in which it was seen, counted from 1.
        norm: Its norm, NaN or Inf.
        counts: Its NaN and Inf elements; None where the gradient was gone when its norm arrived
            from the device.
        place: Its place in the order of the backward.
    """

    index: int
    micro_batch: int
    norm: float
    counts: NonFiniteCount | None
    place: int = 0

    @property
    def is_nan(self) -> bool:
        """Whether it holds a NaN, rather than only Inf."""
        return math.isnan(self.norm) if self.counts is None else self.counts.nan > 0


class Look(NamedTuple):
    """The gradients of a window at the end of one backward, or when the step begins.

    Attributes:
        micro_batch: Micro-batches so far.
        measurement: Their norms.
        order: Indices in the order in which they arrived.
    """

    micro_batch: int
    measurement: Measurement
    order: Sequence[int]

    def offenders(self, gradients: Sequence[Tensor] | None) -> list[Offender]:
        """Lists the parameters that are bad, the first in backward order first.

        Args:
            gradients: Those that were measured; None where they are gone.
        """
        if self.measurement.finite or self.measurement.overflowed:
            return []
        places = {index: place for place, index in enumerate(self.order)}
        found = []
        for index in self.measurement.nonfinite_indices():
            column = self.measurement.indices.index(index)
            counts = None if gradients is None else count_nonfinite(gradients[column])
            if counts is None or counts:
                norm = float(self.measurement.norms.array()[column])
                place = places.get(index, len(places) + column)
                found.append(Offender(index, self.micro_batch, norm, counts, place))
        return sorted(found, key=lambda offender: offender.place)

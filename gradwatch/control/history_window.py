"""The last few norms, and their order statistics: on the host, or on a device without a wait.

Both kinds answer the same but for the last bits, and both leave out what they are told not to keep.
Where nothing has been kept yet, a statistic is NaN.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class HostWindow:
    """The last numbers as Python floats, kept in order of arrival and in order of size."""

    __slots__ = ("_arrived", "_size", "_sorted", "count")

    def __init__(self, size: int, values: Iterable[float] = ()) -> None:
        """Starts with the newest of some values.

        Args:
            size: How many are kept at most.
            values: Finite numbers, oldest first.
        """
        self._size = size
        self._arrived = deque(values, size)
        self._sorted = sorted(self._arrived)
        self.count = len(self._sorted)
        """How many there are."""

    def push(self, value: float, keep: bool) -> None:
        """Takes a number in, and lets the oldest go when full; nothing if it is not to be kept."""
        if not keep:
            return
        if self.count == self._size:
            del self._sorted[bisect_left(self._sorted, self._arrived[0])]
        else:
            self.count += 1
        self._arrived.append(value)
        insort(self._sorted, value)

    def quantile(self, fraction: float) -> float:
        """Returns a quantile, interpolated linearly between neighbours as NumPy does."""
        return _quantile(self._sorted, fraction)

    def spread(self, center: float) -> float:
        """Returns the median distance from a center."""
        return _quantile(sorted([abs(value - center) for value in self._sorted]), 0.5)

    def mean(self) -> float:
        """Returns the mean."""
        if not self.count:
            return math.nan
        return math.fsum(value / self.count for value in self._arrived)

    def deviation(self, center: float) -> float:
        """Returns the root of the mean squared distance from a center."""
        root = math.sqrt(self.count) or math.nan
        return math.hypot(*[(value - center) / root for value in self._arrived])

    def values(self) -> list[float]:
        """Returns the numbers, oldest first."""
        return list(self._arrived)


def _quantile(ordered: list[float], fraction: float) -> float:
    if not ordered:
        return math.nan
    position = fraction * (len(ordered) - 1)
    below = math.floor(position)
    low, high = ordered[below], ordered[math.ceil(position)]
    return low + (high - low) * (position - below)


class DeviceWindow:
    """The last numbers as a tensor ``[size]`` on a device; the places not yet taken hold Inf."""

    __slots__ = ("_values", "count")

    def __init__(self, size: int, values: Iterable[float], like: dict[str, Any]) -> None:
        """Starts with the newest of some values.

        Args:
            size: How many are kept at most.
            values: Finite numbers, oldest first.
            like: Device and dtype.
        """
        newest = list(values)[-size:]
        self._values = torch.tensor([math.inf] * (size - len(newest)) + newest, **like)
        self.count = torch.tensor(float(len(newest)), **like)
        """How many there are, tensor ``[]``."""

    def push(self, value: Tensor, keep: Tensor) -> None:
        """Takes a number ``[]`` in where ``keep``, a bool ``[]``, is true; see ``HostWindow``."""
        shifted = torch.cat((self._values[1:], value.reshape(1)))
        self._values = torch.where(keep, shifted, self._values)
        self.count = torch.clamp(self.count + keep, max=self._values.numel())

    def quantile(self, fraction: float) -> Tensor:
        """Returns a quantile, tensor ``[]``."""
        return self._quantile(self._values, fraction)

    def spread(self, center: Tensor) -> Tensor:
        """Returns the median distance from a center, tensor ``[]``."""
        return self._quantile((self._values - center).abs(), 0.5)

    def mean(self) -> Tensor:
        """Returns the mean, tensor ``[]``."""
        return self._taken(self._values / self.count).sum()

    def deviation(self, center: Tensor) -> Tensor:
        """Returns the root of the mean squared distance from a center, tensor ``[]``."""
        distances = self._taken((self._values - center) / self.count.sqrt())
        # Divided by the largest, no square leaves the range of the dtype.
        largest = distances.abs().max()
        scaled = distances / torch.where(largest > 0, largest, 1.0)
        deviation: Tensor = largest * torch.linalg.vector_norm(scaled)
        return deviation

    def values(self) -> list[float]:
        """Returns the numbers, oldest first; this waits for the device."""
        return [value for value in self._values.tolist() if math.isfinite(value)]

    def _taken(self, numbers: Tensor) -> Tensor:
        return torch.where(torch.isfinite(self._values), numbers, 0.0)

    def _quantile(self, numbers: Tensor, fraction: float) -> Tensor:
        position = torch.clamp(fraction * (self.count - 1), min=0)
        below = position.floor()
        # Indexing with a tensor [] would wait for it; selecting with one of [2] does not.
        neighbours = torch.stack((below, position.ceil())).long()
        low, high = numbers.sort().values.index_select(0, neighbours).unbind()
        between: Tensor = low + (high - low) * (position - below)
        return between

"""The norms that a policy remembers, on the host or on a device, and through a checkpoint."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from gradwatch.clip.policy import ClipDecision
from gradwatch.measure.deferred import is_at_hand


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


Scalar: TypeAlias = Any  # a float on the host, a tensor [] on a device
Flag: TypeAlias = Any  # a bool on the host, a tensor [] of bool on a device


def exact_dtype(device: torch.device) -> torch.dtype:
    """Returns the most exact dtype that a device computes in."""
    return torch.float32 if device.type == "mps" else torch.float64


class Backend(Protocol):
    """The functions that rules are written with."""

    @property
    def device(self) -> torch.device | None:
        """The device; None on the host."""

    def log(self, value: Scalar, /) -> Scalar:
        """Returns the natural logarithm of a positive value."""

    def exp(self, value: Scalar, /) -> Scalar:
        """Returns e to the power of a value; Inf where the dtype does not reach."""

    def hypot(self, one: Scalar, other: Scalar, /) -> Scalar:
        """Returns the root of the sum of two squares."""

    def ratio(self, dividend: Scalar, divisor: Scalar, /) -> Scalar:
        """Divides; by zero, the result is not finite and not meant to be used."""

    def where(self, flag: Flag, then: Scalar, otherwise: Scalar, /) -> Scalar:
        """Chooses between two values that are both computed; one of them is no constant."""

    def smaller(self, value: Scalar, bound: Scalar, /) -> Scalar:
        """Returns the smaller of a value and a bound; NaN if the value is."""

    def larger(self, value: Scalar, bound: Scalar, /) -> Scalar:
        """Returns the larger of a value and a bound; NaN if the value is."""

    def may_be(self, flag: Flag, /) -> bool:
        """Tells whether a flag may be true; on a device always, for to look would be to wait."""

    def take(self, norm: Tensor, /) -> tuple[Scalar, Flag]:
        """Takes a norm ``[]`` in.

        Returns:
            The norm, and whether it says anything about the scale of others: it does not if it is
            zero or not finite, and is then 1 instead.
        """

    def number(self, value: float, /) -> Scalar:
        """Takes a number in."""

    def window(self, size: int, values: Iterable[float], /) -> HostWindow | DeviceWindow:
        """Makes a window that starts with the newest of some values."""


class FloatBackend:
    """Python floats."""

    device: torch.device | None = None
    log = staticmethod(math.log)
    hypot = staticmethod(math.hypot)

    @staticmethod
    def exp(value: float) -> float:
        """Returns e to the power of a value; Inf where a float does not reach."""
        return math.exp(value) if value < 709.0 else math.inf

    @staticmethod
    def ratio(dividend: float, divisor: float) -> float:
        """Divides; by zero, the result is Inf and not meant to be used."""
        return dividend / divisor if divisor else math.inf

    @staticmethod
    def where(flag: bool, then: float, otherwise: float) -> float:
        """Chooses between two values that are both computed."""
        return then if flag else otherwise

    @staticmethod
    def smaller(value: float, bound: float) -> float:
        """Returns the smaller of a value and a bound; NaN if the value is."""
        return min(value, bound)

    @staticmethod
    def larger(value: float, bound: float) -> float:
        """Returns the larger of a value and a bound; NaN if the value is."""
        return max(value, bound)

    @staticmethod
    def may_be(flag: bool) -> bool:
        """Tells whether a flag may be true."""
        return flag

    @staticmethod
    def take(norm: Tensor) -> tuple[float, bool]:
        """Takes a norm in, and tells whether it says anything."""
        value = norm.item()
        usable = 0.0 < value < math.inf
        return (value if usable else 1.0), usable

    @staticmethod
    def number(value: float) -> float:
        """Takes a number in."""
        return float(value)

    @staticmethod
    def window(size: int, values: Iterable[float]) -> HostWindow:
        """Makes a window."""
        return HostWindow(size, values)


class TensorBackend:
    """Tensors ``[]`` on one device, in the most exact dtype that it has."""

    exp = staticmethod(torch.exp)
    log = staticmethod(torch.log)
    hypot = staticmethod(torch.hypot)
    ratio = staticmethod(torch.div)

    def __init__(self, device: torch.device) -> None:
        """Takes the device of the norms."""
        self.device = device
        self.dtype = exact_dtype(device)

    @staticmethod
    def where(flag: Tensor, then: Scalar, otherwise: Scalar) -> Tensor:
        """Chooses between two values that are both computed."""
        return torch.where(flag, then, otherwise)

    @staticmethod
    def smaller(value: Tensor, bound: float | Tensor) -> Tensor:
        """Returns the smaller of a value and a bound; NaN if the value is."""
        return torch.clamp(value, max=bound)

    @staticmethod
    def larger(value: Tensor, bound: float | Tensor) -> Tensor:
        """Returns the larger of a value and a bound; NaN if the value is."""
        return torch.clamp(value, min=bound)

    @staticmethod
    def may_be(flag: Tensor) -> bool:
        """Tells whether a flag may be true: always, for nobody has looked."""
        return True

    def take(self, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Takes a norm in, and tells whether it says anything."""
        value = norm.detach().to(self.dtype)
        usable = torch.isfinite(value) & (value > 0)
        return torch.where(usable, value, 1.0), usable

    def number(self, value: float) -> Tensor:
        """Takes a number in."""
        return torch.tensor(value, dtype=self.dtype, device=self.device)

    def window(self, size: int, values: Iterable[float]) -> DeviceWindow:
        """Makes a window."""
        return DeviceWindow(size, values, {"dtype": self.dtype, "device": self.device})


class NormHistory:
    """A window of norms and a few numbers, on the host or on a device.

    Attributes:
        place: Where they are, and with which functions to compute there.
        window: The last norms, or what a rule keeps in their stead.
        numbers: Further numbers by name, each a float or a tensor ``[]``.
    """

    def __init__(self, size: int, names: Sequence[str] = ()) -> None:
        """Starts empty, on the host.

        Args:
            size: The length of the window.
            names: Names of the numbers; they start at 0.
        """
        self._size = size
        self._names = tuple(names)
        self.place: Backend = FloatBackend()
        self.window: HostWindow | DeviceWindow
        self.numbers: dict[str, Scalar]
        self._fill([], dict.fromkeys(self._names, 0.0))

    def at(self, norm: Tensor) -> Backend:
        """Moves to where a norm is; this waits only if that has changed.

        Args:
            norm: Tensor ``[]``.

        Returns:
            The place.
        """
        device = None if is_at_hand(norm) else norm.device
        if device != self.place.device:
            state = self.state_dict()
            self.place = FloatBackend() if device is None else TensorBackend(device)
            self.load_state_dict(state)
        return self.place

    def state_dict(self) -> dict[str, Any]:
        """Returns the window as a list, oldest first, and the numbers as floats."""
        numbers = {name: float(value) for name, value in self.numbers.items()}
        return {"window": self.window.values(), **numbers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave, there or in a memory with another length.

        Raises:
            ValueError: If something is missing or not finite.
        """
        expected = ("window", *self._names)
        missing = [name for name in expected if name not in state]
        if missing:
            raise ValueError(
                f"The state of a clipping policy needs {', '.join(expected)}; {', '.join(missing)} "
                "is missing. Load what state_dict() of the same policy gave."
            )
        window = [float(value) for value in state["window"]]
        numbers = {name: float(state[name]) for name in self._names}
        if not all(map(math.isfinite, (*window, *numbers.values()))):
            raise ValueError(
                "The state of a clipping policy must be finite; this one is not. Load what "
                "state_dict() gave, or start without a state."
            )
        self._fill(window, numbers)

    def _fill(self, window: Sequence[float], numbers: Mapping[str, float]) -> None:
        self.window = self.place.window(self._size, window)
        self.numbers = {name: self.place.number(value) for name, value in numbers.items()}


Limit = Callable[[Backend, Scalar, Flag], Scalar]


def limit_norm(total_norm: Tensor, memory: NormHistory, limit: Limit) -> ClipDecision:
    """Decides by a limit that follows from earlier norms.

    A norm that is zero or not finite says nothing about the scale of the others: it is left alone,
    and nothing is remembered of it.

    Args:
        total_norm: Tensor ``[]``.
        memory: What the rule remembers.
        limit: Given the place, the norm, and whether to take note of it: returns the limit, Inf
            for none, and updates the memory.

    Returns:
        The decision. Its threshold is NaN where there is no limit.
    """
    place = memory.at(total_norm)
    norm, keep = place.take(total_norm)
    if not isinstance(place, FloatBackend):
        return _on_device(norm, limit(place, norm, keep), keep, total_norm.dtype)
    return _on_host(norm, limit(place, norm, keep), total_norm.dtype) if keep else ClipDecision()


def _on_host(norm: float, limit: float, dtype: torch.dtype) -> ClipDecision:
    if norm <= limit:
        return ClipDecision(threshold=limit if limit < math.inf else math.nan)
    return ClipDecision(torch.tensor(limit / norm, dtype=dtype), limit)


def _on_device(norm: Tensor, limit: Tensor, keep: Tensor, dtype: torch.dtype) -> ClipDecision:
    factor = torch.clamp(limit / norm, max=1.0)
    return ClipDecision(
        coefficient=torch.where(keep, factor, 1.0).to(dtype),
        threshold=torch.where(keep & torch.isfinite(limit), limit, math.nan).to(dtype),
    )

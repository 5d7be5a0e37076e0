"""Rules that remember norms: each is written once, and runs on floats or on device tensors.

On the host a rule computes with Python floats. If the norm is still on an accelerator, it computes
with tensors ``[]`` instead, so that nothing waits for the device. A rule gets its mathematical
functions from a :class:`Backend`, and the norms of earlier steps from a :class:`NormHistory`.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gradwatch.clip.policy import ClipDecision
from gradwatch.measure.deferred import is_at_hand
from gradwatch.measure.devices import exact_dtype, sent
from gradwatch.pickles import stable_name

MAD_TO_DEVIATION = 1.4826
"""The ratio of a normal distribution's standard deviation to its median absolute deviation."""

# Any, because no type says "floats or tensors, but never mixed", and rules mix in constants.
Scalar: TypeAlias = Any  # a float on the host, a tensor [] on a device
Flag: TypeAlias = Any  # a bool on the host, a tensor [] of bool on a device
Backend: TypeAlias = "_FloatBackend | _TensorBackend"


def moving_average(average: Scalar, value: Scalar, past: float) -> Scalar:
    """Moves an exponential average towards a value; ``past`` is the weight of the old average."""
    if isinstance(average, Tensor) and average.dtype is torch.float32:
        # Rounded to float32, the two weights below do not add up to 1: an average of equal numbers
        # would be off by up to 1e-7 / (1 - past).
        return average + (1 - past) * (value - average)
    return past * average + (1 - past) * value


def moving_deviation(deviation: Scalar, distance: Scalar, past: float, hypot: Any) -> Scalar:
    """Moves an exponential average of squares, given by its root, towards the square of a number.

    Roots are passed and returned because the square of 1e-200 is 0.
    """
    if isinstance(deviation, Tensor) and deviation.dtype is torch.float32:
        # For the same reason; relative to the larger one, so that no square underflows.
        largest = torch.maximum(deviation, distance.abs())
        unit = torch.where(largest > 0, largest, 1.0)
        squared = moving_average((deviation / unit) ** 2, (distance / unit) ** 2, past)
        return largest * squared.sqrt()
    return hypot(math.sqrt(past) * deviation, math.sqrt(1 - past) * distance)


class HistoryRule:
    """A rule that remembers norms: its state is its history."""

    _history: NormHistory

    def _remember(self, size: int, numbers: Sequence[str] = ()) -> None:
        # The rules are frozen dataclasses: their settings are constant, only the history changes.
        object.__setattr__(self, "_history", NormHistory(size, numbers))

    def __setstate__(self, state: dict[str, Any]) -> None:
        # In pickles of gradwatch 0.1 the history is named "_memory".
        self.__dict__.update({("_history" if k == "_memory" else k): v for k, v in state.items()})

    def state_dict(self) -> dict[str, Any]:
        """Returns the history as plain numbers; on an accelerator this waits for the device."""
        return self._history.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state that :meth:`state_dict` returned."""
        self._history.load_state_dict(state)


class HistoryClip(HistoryRule):
    """A clipping policy that limits the total norm according to earlier norms.

    A norm that is zero or not finite says nothing about the scale of the others. It is not clipped
    and does not enter the history.
    """

    def decide(self, total_norm: Tensor) -> ClipDecision:
        """Decides how to clip one step; see :class:`~gradwatch.clip.policy.ClipPolicy`."""
        backend, norm, keep = self._history.read(total_norm)
        if keep is False:  # only on the host; on a device both branches are computed
            return ClipDecision()
        limit = self._limit(backend, norm, keep)
        if isinstance(keep, Tensor):
            return _decide_on_device(norm, limit, keep, total_norm.dtype)
        return _decide_on_host(norm, limit, total_norm.dtype)

    def _limit(self, backend: Backend, norm: Scalar, keep: Flag) -> Scalar:
        """Returns the limit, or Inf for none, and adds the norm to the history if ``keep``."""
        raise NotImplementedError


def _decide_on_host(norm: float, limit: float, dtype: torch.dtype) -> ClipDecision:
    if norm <= limit:
        return ClipDecision(threshold=limit if limit < math.inf else math.nan)
    return ClipDecision(torch.tensor(limit / norm, dtype=dtype, device="cpu"), limit)


def _decide_on_device(
    norm: Tensor, limit: Tensor, keep: Tensor, dtype: torch.dtype
) -> ClipDecision:
    # Both branches are computed and one is selected, as an `if` would wait for the flag.
    factor = torch.clamp(limit / norm, max=1.0)
    return ClipDecision(
        coefficient=torch.where(keep, factor, 1.0).to(dtype),
        threshold=torch.where(keep & torch.isfinite(limit), limit, math.nan).to(dtype),
    )


@stable_name
class NormHistory:
    """A window of earlier norms and a few further numbers, on the device of the newest norm.

    Args:
        size: The most norms that the window holds.
        names: Names of the further numbers; they start at 0.

    Attributes:
        window: The last norms, or what a rule keeps instead of them, such as their logarithms.
        numbers: The further numbers by name, each a float or a tensor ``[]``.
    """

    def __init__(self, size: int, names: Sequence[str] = ()) -> None:
        self._size, self._names = size, tuple(names)
        self._backend: Backend = _FloatBackend()
        self.window: _FloatWindow | _TensorWindow
        self.numbers: dict[str, Scalar]
        self._fill([], dict.fromkeys(self._names, 0.0))

    def __setstate__(self, state: dict[str, Any]) -> None:
        # In pickles of gradwatch 0.1 the backend is named "place".
        self.__dict__.update({("_backend" if k == "place" else k): v for k, v in state.items()})

    def read(self, norm: Tensor) -> tuple[Backend, Scalar, Flag]:
        """Reads a norm ``[]``; waits only if the previous one was on another device.

        Returns:
            The backend to compute with; the norm; and whether the norm is usable: if it is zero or
            not finite, the flag is false and the norm is replaced by 1.
        """
        device = None if is_at_hand(norm) else norm.device
        if device != self._backend.device:
            state = self.state_dict()
            self._backend = _FloatBackend() if device is None else _TensorBackend(device)
            self.load_state_dict(state)
        value, keep = self._backend.read(norm)
        return self._backend, value, keep

    def state_dict(self) -> dict[str, Any]:
        """Returns the window as a list, oldest first, and the numbers as floats."""
        numbers = {name: float(value) for name, value in self.numbers.items()}
        return {"window": self.window.values(), **numbers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state that :meth:`state_dict` returned, of a window of any length.

        Raises:
            ValueError: If an entry is missing or not finite.
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
        # One NaN would stay in every later mean, and break the order of the sorted window.
        if not all(map(math.isfinite, (*window, *numbers.values()))):
            raise ValueError(
                "The state of a clipping policy must be finite; this one is not. Load what "
                "state_dict() gave, or start without a state."
            )
        self._fill(window, numbers)

    def _fill(self, window: Sequence[float], numbers: Mapping[str, float]) -> None:
        self.window = self._backend.window(self._size, window)
        self.numbers = {name: self._backend.scalar(value) for name, value in numbers.items()}


@stable_name
class _FloatWindow:
    """The last numbers as Python floats: in order of arrival and, for quantiles, sorted.

    Attributes:
        count: How many numbers there are.
    """

    __slots__ = ("_arrived", "_size", "_sorted", "count")

    def __init__(self, size: int, values: Iterable[float]) -> None:
        self._size = size
        self._arrived = deque(values, size)  # only the newest, if there are more than fit
        self._sorted = sorted(self._arrived)
        self.count = len(self._sorted)

    def push(self, value: Scalar, keep: Flag) -> None:
        """Adds a number if ``keep`` is true; when full, the oldest number is dropped."""
        if not keep:
            return
        # Sorting a window of 1000 in every step would cost more than the rest of the rule.
        if self.count == self._size:
            del self._sorted[bisect_left(self._sorted, self._arrived[0])]
        else:
            self.count += 1
        self._arrived.append(value)
        insort(self._sorted, value)

    def quantile(self, fraction: float) -> Scalar:
        """Returns a quantile, interpolated linearly between neighbors as NumPy does."""
        return _quantile(self._sorted, fraction)

    def median_distance(self, center: Scalar) -> Scalar:
        return _quantile(sorted([abs(value - center) for value in self._sorted]), 0.5)

    def mean(self) -> Scalar:
        # Divided before the sum, so that numbers near the largest float do not overflow.
        return math.fsum(v / self.count for v in self._arrived) if self.count else math.nan

    def deviation(self, center: Scalar) -> Scalar:
        """Returns the root mean square distance from a center."""
        root = math.sqrt(self.count) or math.nan
        return math.hypot(*[(value - center) / root for value in self._arrived])

    def values(self) -> list[float]:
        """Returns the numbers, oldest first; on a device this waits."""
        return list(self._arrived)


def _quantile(ordered: list[float], fraction: float) -> float:
    if not ordered:
        return math.nan
    position = fraction * (len(ordered) - 1)
    below = math.floor(position)
    low, high = ordered[below], ordered[math.ceil(position)]
    return low + (high - low) * (position - below)


@stable_name
class _TensorWindow:
    """The same as a tensor ``[size]`` on a device; unused entries are Inf, and so sort last."""

    __slots__ = ("_values", "count")

    def __init__(self, size: int, values: Iterable[float], like: dict[str, Any]) -> None:
        newest = list(values)[-size:]
        # full() fills them on the device, and a copy from pinned memory does not wait either.
        self._values = torch.full((size,), math.inf, **like)
        if newest:
            there = torch.tensor(newest, dtype=like["dtype"], device="cpu")
            self._values[size - len(newest) :] = sent(there, like["device"])
        # A tensor, because only the device knows whether the last norms were kept.
        self.count = torch.full((), float(len(newest)), **like)

    def push(self, value: Scalar, keep: Flag) -> None:
        shifted = torch.cat((self._values[1:], value.reshape(1)))
        self._values = torch.where(keep, shifted, self._values)
        self.count = torch.clamp(self.count + keep, max=self._values.numel())

    def quantile(self, fraction: float) -> Scalar:
        return self._quantile(self._values, fraction)

    def median_distance(self, center: Scalar) -> Scalar:
        return self._quantile((self._values - center).abs(), 0.5)

    def mean(self) -> Scalar:
        return self._taken(self._values / self.count).sum()

    def deviation(self, center: Scalar) -> Scalar:
        distances = self._taken((self._values - center) / self.count.sqrt())
        # Distances are divided by the largest, so that no square leaves the range of the dtype.
        largest = distances.abs().max()
        scaled = distances / torch.where(largest > 0, largest, 1.0)
        return largest * torch.linalg.vector_norm(scaled)

    def values(self) -> list[float]:
        return [value for value in self._values.cpu().tolist() if math.isfinite(value)]

    def _taken(self, numbers: Tensor) -> Tensor:
        return torch.where(torch.isfinite(self._values), numbers, 0.0)

    def _quantile(self, numbers: Tensor, fraction: float) -> Tensor:
        position = torch.clamp(fraction * (self.count - 1), min=0)
        below = position.floor()
        # Indexing with a tensor [] would wait for the device; index_select() with [2] does not.
        neighbors = torch.stack((below, position.ceil())).long()
        low, high = numbers.sort().values.index_select(0, neighbors).unbind()
        between: Tensor = low + (high - low) * (position - below)
        return between


@stable_name
class _FloatBackend:
    """Functions of Python floats that return what torch's return where Python's would raise."""

    device: torch.device | None = None
    log, hypot = staticmethod(math.log), staticmethod(math.hypot)
    # min() and max() return a NaN only if it is the first argument. Rules pass the value first, so
    # that the result is that of clamp().
    minimum: Callable[..., Scalar] = staticmethod(min)
    maximum: Callable[..., Scalar] = staticmethod(max)
    window, scalar = _FloatWindow, float

    @staticmethod
    def exp(value: Scalar) -> Scalar:
        return math.exp(value) if value < 709.0 else math.inf  # math.exp(710) raises

    @staticmethod
    def divide(dividend: Scalar, divisor: Scalar) -> Scalar:
        return dividend / divisor if divisor else math.inf

    @staticmethod
    def where(flag: Flag, then: Scalar, otherwise: Scalar) -> Scalar:
        return then if flag else otherwise

    @staticmethod
    def read(norm: Tensor) -> tuple[Scalar, Flag]:
        value = norm.item()
        usable = 0.0 < value < math.inf
        return (value if usable else 1.0), usable


@stable_name
class _TensorBackend:
    """The same functions of tensors ``[]`` on one device, in its most precise dtype."""

    exp, log, hypot = staticmethod(torch.exp), staticmethod(torch.log), staticmethod(torch.hypot)
    divide = staticmethod(torch.div)
    # One of the two values must be a tensor: of two floats torch would make a float32.
    where: Callable[..., Scalar] = staticmethod(torch.where)

    def __init__(self, device: torch.device) -> None:
        self.device, self.dtype = device, exact_dtype(device)

    # clamp() accepts a float as the bound; torch.minimum() and torch.maximum() do not.
    @staticmethod
    def minimum(value: Scalar, bound: Scalar) -> Scalar:
        return torch.clamp(value, max=bound)

    @staticmethod
    def maximum(value: Scalar, bound: Scalar) -> Scalar:
        return torch.clamp(value, min=bound)

    def read(self, norm: Tensor) -> tuple[Scalar, Flag]:
        value = norm.detach().to(self.dtype)
        usable = torch.isfinite(value) & (value > 0)
        return torch.where(usable, value, 1.0), usable

    def scalar(self, value: float) -> Scalar:
        return torch.full((), value, dtype=self.dtype, device=self.device)

    def window(self, size: int, values: Iterable[float]) -> _TensorWindow:
        return _TensorWindow(size, values, {"dtype": self.dtype, "device": self.device})

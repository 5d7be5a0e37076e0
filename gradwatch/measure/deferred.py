"""Deferred numbers: computed on a device, copied to the host without waiting for the device."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradwatch.measure.devices import is_capturing, pinned_like, record_event

Array = NDArray[np.floating[Any]]

_polls_until_arrival: int | None = None


@contextmanager
def late_readings(polls: int = 1) -> Iterator[None]:
    """Treats the CPU like an accelerator, to test on the CPU what a run does on an accelerator.

    Args:
        polls: How many times a copy is polled before it counts as arrived.
    """
    global _polls_until_arrival  # noqa: PLW0603 - one process, one kind of machine
    before, _polls_until_arrival = _polls_until_arrival, polls
    try:
        yield
    finally:
        _polls_until_arrival = before


def is_at_hand(tensor: Tensor) -> bool:
    """Returns whether the numbers of a tensor can be read without waiting for a device."""
    return tensor.is_cpu and _polls_until_arrival is None


class Deferred:
    """The numbers of a tensor of any shape; reading them waits for the device unless ``at_hand``.

    Attributes:
        tensor: The tensor; nothing may write into it later.
    """

    __slots__ = ("_array", "_value", "tensor")

    def __init__(
        self, tensor: Tensor, value: float | None = None, array: Array | None = None
    ) -> None:
        """Keeps a tensor.

        Args:
            tensor: Tensor of any shape and floating dtype, on any device.
            value: The number in a tensor of one element, if it has already been read.
            array: The numbers of the tensor, if they have already been read.
        """
        self.tensor = tensor
        self._array = array
        self._value = value

    @property
    def at_hand(self) -> bool:
        """Whether the numbers can be read without waiting."""
        if self._value is not None or self._array is not None:
            return True
        return is_at_hand(self.tensor)

    def array(self) -> Array:
        """Returns the numbers, in the shape of the tensor; may wait for the device."""
        if self._array is None:
            if self.tensor.is_cpu and not is_at_hand(self.tensor):
                # On a device the copy below waits. Under late_readings() there is no device, and
                # this item() is the wait that a test can count.
                self.tensor.new_zeros(()).item()
            self._array = self.tensor.cpu().numpy()
        return self._array

    def value(self) -> float:
        """Returns the number in a tensor of one element; may wait for the device."""
        if self._value is None:
            # item() copies one number; array() would build a NumPy array first.
            self._value = self.tensor.item() if self._array is None else float(self._array)
        return self._value

    def if_known(self) -> float | None:
        """Returns the number in a tensor of one element, or None if reading it would wait."""
        if self._value is None and self.at_hand:
            return self.value()
        return self._value

    def arrive(self, array: Array) -> None:
        """Stores the numbers that a transfer has copied to the host."""
        self._array = array


FloatOrDeferred = float | Deferred


def resolve(value: FloatOrDeferred) -> float:
    """Returns a number, waiting for it if it is still on a device."""
    return value.value() if isinstance(value, Deferred) else value


def as_operand(value: FloatOrDeferred) -> float | Tensor:
    """Returns a number to calculate with: a float if it is on the host, else the device tensor."""
    if not isinstance(value, Deferred):
        return value
    return value.value() if value.at_hand else value.tensor


def defer(result: float | Tensor) -> FloatOrDeferred:
    """Wraps the result of a calculation on :func:`as_operand` values; reads it if that is free.

    Args:
        result: A float, or a tensor ``[]`` that nothing will write into.
    """
    if not isinstance(result, Tensor):
        return float(result)
    return result.item() if is_at_hand(result) else Deferred(result)


def defer_copy(tensor: Tensor) -> FloatOrDeferred:
    """Reads a tensor ``[]`` if that is free; otherwise keeps a copy to be read later.

    Args:
        tensor: One that its owner may write into later, such as the scale of a ``GradScaler``.
    """
    tensor = tensor.detach()
    return float(tensor) if is_at_hand(tensor) else Deferred(tensor.clone())


def number_or_nan(value: object) -> FloatOrDeferred:
    """Reads a value of the user's that is meant to be a number: a learning rate, a loss.

    Args:
        value: A number of any library, or a real tensor of one element.

    Returns:
        The number; NaN for anything else: None, a string, a function, several numbers.
    """
    if type(value) is float:  # nearly always
        return value
    if isinstance(value, Tensor):
        plain = value.layout is torch.strided and not (value.is_complex() or value.is_meta)
        return defer_copy(value.reshape(())) if plain and value.numel() == 1 else math.nan
    # float() reads the text of a string, and warns of an array of several dimensions.
    number: Any = value
    if isinstance(number, (str, bytes)) or getattr(number, "ndim", None):
        return math.nan
    try:
        return float(number)
    except Exception:  # no number, or one beyond float64
        return math.nan


class Transfer:
    """One asynchronous copy of all numbers of a step to the host."""

    def __init__(self, deferred: Sequence[Deferred]) -> None:
        """Starts the copy of numbers that are on any devices; none of them may be at hand."""
        groups: dict[torch.device, list[Deferred]] = {}
        for one in deferred:
            groups.setdefault(one.tensor.device, []).append(one)
        self._copies = [_Copy(group, device) for device, group in groups.items()]

    def arrived(self) -> bool:
        """Returns whether all numbers can be read; never waits for a device that has events."""
        if self._copies and all(copy.arrived() for copy in self._copies):
            self._read()
        return not self._copies

    def wait(self) -> None:
        """Waits until all numbers can be read."""
        self._read()

    def _read(self) -> None:
        for copy in self._copies:
            copy.read()
        self._copies = []


class _Copy:
    """The copy of the numbers that are on one device.

    Attributes:
        host: The numbers; on the device until they are read, if it has no events.
    """

    def __init__(self, deferred: Sequence[Deferred], device: torch.device) -> None:
        self._deferred = deferred
        self._device = device
        self._polls = _polls_until_arrival or 0
        self._serial = next(_serials)
        # One concatenated tensor: copying a few numbers costs as much as copying many. The last
        # number is known, and so tells whether the copy has arrived if the device cannot be asked.
        flat = torch.cat([*(one.tensor.reshape(-1) for one in deferred), _one(device)])
        self.host, self._event = flat, None
        if device.type == "cpu":
            self.host = flat.clone()
            return
        host = pinned_like(flat)
        if host is not None:
            host.numpy()[-1] = _NOT_ARRIVED
            host.copy_(flat, non_blocking=True)
            self._event = record_event(device)
        if host is not None and self._event is not None:
            self.host = host
        else:
            _queue_of(device).add(self)

    def arrived(self) -> bool:
        self._polls -= 1
        if self._device.type == "cpu":
            return self._polls < 0 or self._serial < _newest_read
        if is_capturing(self._device):
            return False  # to ask an event would break the capture
        if self._event is None:
            return self.host.is_cpu or _queue_of(self._device).is_long()
        return bool(self._event.query())

    def read(self) -> None:
        """Waits for the numbers, and gives each tensor its own."""
        global _newest_read  # noqa: PLW0603 - with a copy, those before it have arrived
        _newest_read = max(_newest_read, self._serial)
        if self._event is not None:
            try:
                self._event.synchronize()
            except Exception:
                # After an assertion failed in a kernel, every call fails. What was copied before
                # is there nevertheless.
                if self.host.numpy()[-1] != _ARRIVED:
                    raise
        elif not self.host.is_cpu:
            _queue_of(self._device).read()
        numbers = self.host.numpy()
        ends = np.cumsum([one.tensor.numel() for one in self._deferred])
        for one, part in zip(self._deferred, np.split(numbers, ends), strict=False):
            # cat() promoted all numbers to the widest dtype. Each is cast back to its own, so that
            # a float32 norm has the same digits whatever it was copied together with.
            precision = np.float64 if one.tensor.dtype == torch.float64 else np.float32
            one.arrive(part.reshape(tuple(one.tensor.shape)).astype(precision))


_ARRIVED, _NOT_ARRIVED = 1.0, 0.0
_serials, _newest_read = count(), -1  # of the copies that late_readings() delays
_WAITS_FOR = 64  # copies; a device without events is waited for once in as many steps


@lru_cache
def _one(device: torch.device) -> Tensor:
    return torch.full((1,), _ARRIVED, dtype=torch.float32, device=device)


class _Queue:
    """The copies from a device without events, which are read many at once, with one wait."""

    def __init__(self) -> None:
        self._waiting: list[weakref.ref[_Copy]] = []

    def add(self, copy: _Copy) -> None:
        self._waiting.append(weakref.ref(copy))

    def is_long(self) -> bool:
        return len(self._waiting) > _WAITS_FOR

    def read(self) -> None:
        """Copies the numbers of all to the host."""
        copies = [copy for one in self._waiting if (copy := one()) is not None]
        self._waiting = []
        if copies:
            sizes = [copy.host.numel() for copy in copies]
            hosts = torch.split(torch.cat([copy.host for copy in copies]).cpu(), sizes)
            for copy, host in zip(copies, hosts, strict=True):
                copy.host = host


@lru_cache
def _queue_of(device: torch.device) -> _Queue:
    return _Queue()

"""Deferred numbers: computed on a device, copied to the host without waiting for the device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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


def exact_dtype(device: torch.device) -> torch.dtype:
    """Returns the most precise floating-point dtype that a device supports."""
    return torch.float32 if device.type == "mps" else torch.float64


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
        self._copies = [(group, *_start_copy(group, device)) for device, group in groups.items()]
        self._polls = _polls_until_arrival or 0

    def arrived(self) -> bool:
        """Returns whether all numbers can be read; never waits."""
        if self._copies:
            self._polls -= 1
            ended = all(event is None or event.query() for _, _, event in self._copies)
            if self._polls < 0 and ended:
                self.wait()
        return not self._copies

    def wait(self) -> None:
        """Waits until all numbers can be read."""
        for deferred, host, event in self._copies:
            if event is not None:
                event.synchronize()
            numbers = host.cpu().numpy()
            ends = np.cumsum([one.tensor.numel() for one in deferred])
            for one, part in zip(deferred, np.split(numbers, ends[:-1]), strict=True):
                # cat() promoted all numbers to the widest dtype. Each is cast back to its own, so
                # that a float32 norm has the same digits whatever it was copied together with.
                precision = np.float64 if one.tensor.dtype == torch.float64 else np.float32
                one.arrive(part.reshape(tuple(one.tensor.shape)).astype(precision))
        self._copies = []


def _start_copy(deferred: Sequence[Deferred], device: torch.device) -> tuple[Tensor, Any]:
    """Starts a copy from one device; returns its target and an event that marks its end.

    The event is None on a device that cannot copy to the host asynchronously.
    """
    # One concatenated tensor: copying a few numbers costs as much as copying many.
    flat = torch.cat([one.tensor.reshape(-1) for one in deferred])
    if device.type not in ("cuda", "xpu"):
        return (flat.clone() if device.type == "cpu" else flat), None
    # Pinned, because a copy to pageable memory waits in spite of non_blocking=True.
    host = torch.empty_like(flat, device="cpu", pin_memory=True)
    host.copy_(flat, non_blocking=True)
    event: Any = getattr(torch, device.type).Event()
    event.record()
    return host, event

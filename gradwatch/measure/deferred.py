"""Deferred numbers: computed on a device, brought to the host without a wait."""

from __future__ import annotations

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
    """Treats the CPU like an accelerator, so that what a run does on one can be seen on the CPU.

    Args:
        polls: How often a copy is asked for before it has arrived.
    """
    global _polls_until_arrival  # noqa: PLW0603 - one process, one kind of machine
    before, _polls_until_arrival = _polls_until_arrival, polls
    try:
        yield
    finally:
        _polls_until_arrival = before


def is_at_hand(tensor: Tensor) -> bool:
    """Tells whether the numbers of a tensor can be read without waiting for a device."""
    return tensor.is_cpu and _polls_until_arrival is None


def exact_dtype(device: torch.device) -> torch.dtype:
    """Returns the most exact dtype that a device computes in."""
    return torch.float32 if device.type == "mps" else torch.float64


class Deferred:
    """The numbers of a tensor of any shape; asking for them waits unless they are at hand.

    Attributes:
        tensor: Where they are computed; nothing may write into it later.
    """

    __slots__ = ("_array", "_value", "tensor")

    def __init__(self, tensor: Tensor, value: float | None = None) -> None:
        """Keeps a tensor.

        Args:
            tensor: Of any shape, floating dtype and device.
            value: The number of a tensor with one element, where it has been read.
        """
        self.tensor = tensor
        self._array: Array | None = None
        self._value = value

    @property
    def at_hand(self) -> bool:
        """Whether asking does not wait."""
        if self._value is not None or self._array is not None:
            return True
        return is_at_hand(self.tensor)

    def array(self) -> Array:
        """Returns the numbers in the shape of the tensor."""
        if self._array is None:
            if self.tensor.is_cpu and not is_at_hand(self.tensor):
                # On a device the copy below waits; under late_readings() this shows the same wait.
                self.tensor.new_zeros(()).item()
            self._array = self.tensor.cpu().numpy()
        return self._array

    def value(self) -> float:
        """Returns the number of a tensor with one element."""
        if self._value is None:
            # item() copies one number; array() would make a NumPy array of it first.
            self._value = self.tensor.item() if self._array is None else float(self._array)
        return self._value

    def if_known(self) -> float | None:
        """Returns the number of a tensor with one element; None where asking would wait."""
        if self._value is None and self.at_hand:
            return self.value()
        return self._value

    def arrive(self, array: Array) -> None:
        """Accepts the numbers that a transfer has brought."""
        self._array = array


FloatOrDeferred = float | Deferred


def resolve(value: FloatOrDeferred) -> float:
    """Returns a number, waiting where it is still on a device."""
    return value.value() if isinstance(value, Deferred) else value


def as_operand(value: FloatOrDeferred) -> float | Tensor:
    """Returns a number to calculate with, where it is: on the host, or as a tensor on a device."""
    if not isinstance(value, Deferred):
        return value
    return value.value() if value.at_hand else value.tensor


def defer(result: float | Tensor) -> FloatOrDeferred:
    """Wraps the result of a calculation with :func:`as_operand`; reads it where that costs nothing.

    Args:
        result: A float, or a tensor ``[]`` that nothing will write into.
    """
    if not isinstance(result, Tensor):
        return float(result)
    return result.item() if is_at_hand(result) else Deferred(result)


def defer_copy(tensor: Tensor) -> FloatOrDeferred:
    """Reads a tensor ``[]`` where that costs nothing, else keeps a copy to be read later.

    Args:
        tensor: One that its owner may write into later, the scale of a ``GradScaler`` say.
    """
    tensor = tensor.detach()
    return float(tensor) if is_at_hand(tensor) else Deferred(tensor.clone())


class Transfer:
    """One asynchronous copy to the host of all numbers of a step."""

    def __init__(self, deferred: Sequence[Deferred]) -> None:
        """Starts the copy.

        Args:
            deferred: What is to be read, on any devices; none that is at hand.
        """
        groups: dict[torch.device, list[Deferred]] = {}
        for one in deferred:
            groups.setdefault(one.tensor.device, []).append(one)
        self._copies = [(group, *_start_copy(group, device)) for device, group in groups.items()]
        self._polls = _polls_until_arrival or 0

    def arrived(self) -> bool:
        """Tells, without waiting, whether all numbers can be read."""
        if self._copies:
            self._polls -= 1
            ended = all(event is None or event.query() for _, _, event in self._copies)
            if self._polls < 0 and ended:
                self.wait()
        return not self._copies

    def wait(self) -> None:
        """Waits until they can."""
        for deferred, host, event in self._copies:
            if event is not None:
                event.synchronize()
            numbers = host.cpu().numpy()
            ends = np.cumsum([one.tensor.numel() for one in deferred])
            for one, part in zip(deferred, np.split(numbers, ends[:-1]), strict=True):
                # cat() promoted all to the widest dtype; each gets its own back, so that a float32
                # norm has the same digits whatever it travelled with.
                precision = np.float64 if one.tensor.dtype == torch.float64 else np.float32
                one.arrive(part.reshape(tuple(one.tensor.shape)).astype(precision))
        self._copies = []


def _start_copy(deferred: Sequence[Deferred], device: torch.device) -> tuple[Tensor, Any]:
    """Starts a copy from one device; returns where to, and an event that tells when it has ended.

    A device that cannot copy to the host by itself has no event.
    """
    # Of one tensor: a copy of a few numbers costs as much as a copy of many.
    flat = torch.cat([one.tensor.reshape(-1) for one in deferred])
    if device.type not in ("cuda", "xpu"):
        return (flat.clone() if device.type == "cpu" else flat), None
    # A copy to pageable memory waits in spite of non_blocking=True.
    host = torch.empty_like(flat, device="cpu", pin_memory=True)
    host.copy_(flat, non_blocking=True)
    event: Any = getattr(torch, device.type).Event()
    event.record()
    return host, event

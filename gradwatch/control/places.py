"""Where a rule computes: on the host with Python floats, or on a device with tensors ``[]``.

A rule is written once, with the functions of a place. On the host they take about a twentieth of
the time; on a device they never wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from gradwatch.control.history_window import DeviceWindow, HostWindow

Scalar: TypeAlias = Any  # a float on the host, a tensor [] on a device
Flag: TypeAlias = Any  # a bool on the host, a tensor [] of bool on a device


def exact_dtype(device: torch.device) -> torch.dtype:
    """Returns the most exact dtype that a device computes in."""
    return torch.float32 if device.type == "mps" else torch.float64


class Place(Protocol):
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


class Host:
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


class Device:
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

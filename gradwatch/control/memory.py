"""Memory: what a rule keeps of earlier norms, wherever the norms are, and through a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradwatch.control.history_window import DeviceWindow, HostWindow
from gradwatch.control.places import Device, Flag, Host, Place, Scalar
from gradwatch.control.policy import ClipDecision
from gradwatch.observe.readings import is_at_hand


class Memory:
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
        self.place: Place = Host()
        self.window: HostWindow | DeviceWindow
        self.numbers: dict[str, Scalar]
        self._fill([], dict.fromkeys(self._names, 0.0))

    def at(self, norm: Tensor) -> Place:
        """Moves to where a norm is; this waits only if that has changed.

        Args:
            norm: Tensor ``[]``.

        Returns:
            The place.
        """
        device = None if is_at_hand(norm) else norm.device
        if device != self.place.device:
            state = self.state_dict()
            self.place = Host() if device is None else Device(device)
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


Limit = Callable[[Place, Scalar, Flag], Scalar]


def limit_norm(total_norm: Tensor, memory: Memory, limit: Limit) -> ClipDecision:
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
    if not isinstance(place, Host):
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

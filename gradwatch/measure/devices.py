"""What devices can do, and how numbers get from one to another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gradwatch.errors import is_of_device

_WIDEST = (torch.float64, torch.complex128)
_NARROWER = (torch.float32, torch.complex64)


def exact_dtype(device: torch.device) -> torch.dtype:
    """Returns the most precise floating-point dtype of a device: float64, or else float32."""
    if device.type == "cpu":
        return torch.float64
    try:  # by what it can do: more devices than Apple's MPS have no float64
        torch.empty(0, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return torch.float32
    return torch.float64


def in_exact(tensor: Tensor) -> Tensor:
    """Converts a tensor to the most precise dtype of its device; a complex one stays complex."""
    try:
        return tensor.to(_WIDEST[tensor.is_complex()])
    except (TypeError, RuntimeError):
        if tensor.is_cpu:
            raise
        return tensor.to(_NARROWER[tensor.is_complex()])


def in_double(tensor: Tensor) -> Tensor:
    """Converts a tensor to float64, a complex one to complex128.

    Where its device has none, the result is on the CPU; to get it there waits for the device.
    """
    device = tensor.device if exact_dtype(tensor.device) is torch.float64 else torch.device("cpu")
    return tensor.to(device).to(_WIDEST[tensor.is_complex()])


def as_exact(number: float | Tensor, device: torch.device) -> Tensor:
    """Returns a number as a tensor ``[]`` on a device, in its most precise dtype.

    It waits only on the way from an accelerator to the CPU.
    """
    dtype = exact_dtype(device)
    if isinstance(number, Tensor):
        return sent_as(number.reshape(()), device, dtype)
    return torch.full((), number, dtype=dtype, device=device)


def home_of(tensors: Iterable[Tensor]) -> torch.device:
    """Returns the device on which numbers of tensors are brought together.

    The first accelerator, or the CPU if there is none: the way from the CPU to an accelerator costs
    no wait, and the way back does.
    """
    home = None
    for tensor in tensors:
        if not tensor.is_cpu:
            return tensor.device
        home = tensor.device
    return torch.device("cpu") if home is None else home


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor on a device; waits only if numbers of an accelerator go to the CPU.

    Where the device has no float64, it gets float32.
    """
    if tensor.device == device:
        return tensor
    if tensor.dtype in _WIDEST and exact_dtype(device) is torch.float32:
        tensor = tensor.to(_NARROWER[tensor.is_complex()])
    if device.type == "cpu":
        # Whoever reads it there does so at once. A copy that is not waited for holds garbage.
        return tensor.to(device)
    if not tensor.is_cpu:
        return tensor.to(device, non_blocking=True)  # in the order of both streams
    if not tensor.numel():  # there is no pinned memory of no size
        return torch.empty_like(tensor, device=device)
    pinned = pinned_like(tensor)
    copy = tensor if pinned is None else pinned.copy_(tensor)
    return copy.to(device, non_blocking=True)


def sent_as(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns a tensor on a device and in a dtype of it; waits where :func:`sent` does."""
    if device.type == "cpu":  # where the other device may not have the dtype
        return tensor.to(device, dtype)
    return sent(tensor.to(dtype), device)


def pinned_like(tensor: Tensor) -> Tensor | None:
    """Makes a CPU tensor of the same shape and dtype that a device copies to without a wait.

    Returns:
        A tensor in pinned memory; None where there is none.
    """
    try:  # a copy to other memory waits in spite of non_blocking=True
        return torch.empty_like(tensor, device="cpu", pin_memory=True)
    except (TypeError, RuntimeError):
        return None


@lru_cache
def _capture_check(device_type: str) -> Callable[[], bool] | None:
    module = getattr(torch, device_type, None)
    return getattr(module, "is_current_stream_capturing", None)


def is_capturing(device: torch.device) -> bool:
    """Returns whether the current stream of this kind of device is captured into a graph.

    What is captured runs when the graph is replayed, without Python. Meanwhile nothing may ask an
    event or the device for anything, or the capture fails.
    """
    if device.type == "cpu":
        return False
    check = _capture_check(device.type)
    return check is not None and check()


def record_event(device: torch.device) -> Any:
    """Records an event on the current stream of a device, which need not be the current device.

    Returns:
        An event with ``query()`` and ``synchronize()``; None if the device has none.
    """
    module = getattr(torch, device.type, None)
    kind = getattr(module, "Event", None)
    try:
        streams: Any = module if hasattr(module, "current_stream") else torch.accelerator
        event: Any = torch.Event(device=device) if kind is None else kind()
        try:
            # Without a stream, torch.cuda.Event would take the current one of the *current* device.
            event.record(streams.current_stream(device))
        except TypeError:  # that of Apple's MPS takes none: it has one device with one stream
            event.record()
    except (AttributeError, TypeError, RuntimeError) as error:
        if is_of_device(error):
            raise
        return None
    return event

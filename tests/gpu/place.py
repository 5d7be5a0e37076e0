"""Where the checks run: a GPU, a stand-in for one, or, in a dry run, a CPU treated like one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch.optim import SGD, AdamW, Optimizer

from gradwatch.testing import late_readings
from tests.gpu.registry import Skipped
from tests.support.calls import CountCalls

ALWAYS = 1.5e6
"""Cycles per millisecond of a GPU, roughly: what keeps it busy need not be exact."""

LAUNCHES = ("LaunchKernel", "MemsetAsync", "LaunchCooperativeKernel", "ExtModuleLaunch")
SYNCHRONIZES = ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize")


@dataclass
class Count:
    """What torch did inside of a ``with counting()``; set when it ends.

    Attributes:
        kernels: Kernels that were launched on a GPU; elsewhere, calls of torch's operations.
        waits: How often the host waited for the device; in a dry run, asked for a number.
    """

    kernels: float = 0
    waits: float = 0

    def __sub__(self, other: Count) -> Count:
        return Count(self.kernels - other.kernels, self.waits - other.waits)

    def __truediv__(self, number: float) -> Count:
        return Count(self.kernels / number, self.waits / number)


@dataclass(frozen=True)
class Place:
    """A device, and what the checks ask of it.

    Attributes:
        device: The device to train on; in a dry run the CPU.
        dry: Whether the CPU stands in for a device, by ``gradwatch.testing.late_readings``.
        module: The module that made a stand-in device known, with its ``counting()``; else None.
    """

    device: torch.device
    dry: bool = False
    module: ModuleType | None = None

    @property
    def cuda(self) -> bool:
        """Whether it is a GPU of CUDA or ROCm."""
        return self.device.type == "cuda"

    @property
    def small(self) -> bool:
        """Whether to check on small models, as times mean nothing here."""
        return not self.cuda

    @property
    def count(self) -> int:
        """The number of devices of this kind."""
        return 1 if self.dry else int(getattr(torch, self.device.type).device_count())

    @property
    def devices(self) -> list[torch.device]:
        """All devices of this kind; in a dry run the CPU alone."""
        if self.dry:
            return [self.device]
        return [torch.device(self.device.type, index) for index in range(self.count)]

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(0) if self.cuda else str(self.device)
        return f"{name} (dry)" if self.dry else name

    def late(self, polls: int = 3) -> AbstractContextManager[None]:
        """Returns a context in which numbers come late: on a device they do so by themselves.

        In a dry run they arrive when they have been asked for so many times.
        """
        return late_readings(polls) if self.dry else nullcontext()

    def synchronize(self) -> None:
        """Waits for everything that the device has been asked to do."""
        if not self.dry:
            getattr(torch, self.device.type).synchronize()

    def busy(self, milliseconds: float, device: torch.device | None = None) -> None:
        """Keeps a GPU busy, so that whoever reads too early reads what was there before."""
        if self.cuda:
            with torch.cuda.device(device or torch.cuda.current_device()):
                torch.cuda._sleep(int(milliseconds * ALWAYS))

    def stream(self) -> Any:
        """Returns a new stream of the device; a dry run has none."""
        if self.dry or not hasattr(torch, "accelerator"):
            raise Skipped("needs streams")
        return torch.cuda.Stream() if self.cuda else torch.Stream(self.device)

    def current_stream(self) -> Any:
        """Returns the current stream of the device."""
        return torch.cuda.current_stream() if self.cuda else torch.accelerator.current_stream()

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Returns a context in which a stream is the current one."""
        return torch.cuda.stream(stream) if self.cuda else stream

    @contextmanager
    def counting(self) -> Iterator[Count]:
        """Counts kernels and waits of what happens inside."""
        count = Count()
        if self.cuda:
            with _counting_on_a_gpu(count):
                yield count
            return
        waits = self.module.counting() if self.module else nullcontext()
        with waits as seen, CountCalls() as calls:
            yield count
        count.kernels = sum(calls.calls.values())
        count.waits = calls.waits if seen is None else seen.waits


@contextmanager
def _counting_on_a_gpu(count: Count) -> Iterator[None]:
    """Counts the calls of the CUDA runtime that the profiler sees."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        yield
        # What is still under way ends outside of the count: the profiler waits for it itself.
        torch.cuda.synchronize()
    calls: Counter[str] = Counter()
    for event in seen.events() or ():
        on_host = event.device_type == torch.autograd.DeviceType.CPU
        if on_host and event.name.startswith(("cuda", "cu", "hip")):
            calls[event.name] += 1
    count.kernels = sum(n for name, n in calls.items() if any(k in name for k in LAUNCHES))
    synchronized = sum(n for name, n in calls.items() if any(k in name for k in SYNCHRONIZES))
    count.waits = max(synchronized - 1, 0)  # the one above
    if not count.kernels:
        raise Skipped("the profiler sees no kernel: it may lack the rights, or CUPTI")


def adamw(parameters: Any) -> Optimizer:
    """Returns AdamW."""
    return AdamW(parameters, lr=1e-3)


def fused_adamw(parameters: Any) -> Optimizer:
    """Returns AdamW whose step is one kernel."""
    return AdamW(parameters, lr=1e-3, fused=True)


def sgd(parameters: Any) -> Optimizer:
    """Returns SGD with momentum."""
    return SGD(parameters, lr=1e-2, momentum=0.9)


def fused_sgd(parameters: Any) -> Optimizer:
    """Returns SGD with momentum whose step is one kernel."""
    return SGD(parameters, lr=1e-2, momentum=0.9, fused=True)


MAKE = {"AdamW": adamw, "fused AdamW": fused_adamw, "SGD": sgd, "fused SGD": fused_sgd}
"""The optimizers that the checks train with."""

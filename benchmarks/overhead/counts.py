"""Counts of what PyTorch does in a step: the same on a busy machine and on a quiet one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gradwatch
from benchmarks.overhead.variants import Step, Variant
from gradwatch.testing import late_readings

WAITS = frozenset(
    {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"}
)
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel")


@dataclass(frozen=True)
class Counts:
    """What PyTorch does in one step.

    Attributes:
        calls: ATen calls from Python and autograd, without the calls inside them; 0 on a GPU.
        numbers: How often the host reads a number from a tensor.
        waits: How often the host waits for the GPU; 0 on a CPU.
        kernels: Number of kernels launched on the GPU; 0 on a CPU.
    """

    calls: int = 0
    numbers: int = 0
    waits: int = 0
    kernels: int = 0

    def __sub__(self, other: Counts) -> Counts:
        return Counts(
            self.calls - other.calls,
            self.numbers - other.numbers,
            self.waits - other.waits,
            self.kernels - other.kernels,
        )


class CountCalls(TorchDispatchMode):
    """Counts every ATen call, by name, while the mode is active."""

    def __init__(self) -> None:
        """Starts with no calls."""
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Counts the call, and makes it."""
        self.calls[str(function)] += 1
        return function(*args, **(kwargs or {}))


STEPS_BEFORE = 2
"""In its first two steps a watcher measures gradients once more than in most others."""


def count_variant(variant: Variant, device: str) -> Counts:
    """Counts what the third step of a variant does on a device, ``"cpu"`` or ``"cuda"``."""
    with variant.prepare() as loop:
        for _ in range(STEPS_BEFORE):
            loop.step()
        return count_cuda(loop.step) if device == "cuda" else count_cpu(loop.step)


def count_cpu(step: Step) -> Counts:
    """Counts the ATen calls of a step."""
    with CountCalls() as counter:
        step()
    numbers = counter.calls["aten._local_scalar_dense.default"]
    return Counts(calls=counter.calls.total(), numbers=numbers)


def count_cuda(step: Step) -> Counts:
    """Counts the kernels and waits of a step with PyTorch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        step()
    return tally([event.name for event in profiler.events()])


def tally(names: Iterable[str]) -> Counts:
    """Counts waits and kernels in the events of a profile.

    Args:
        names: Names of the events. The profiler itself waits for the device once, at its end; that
            wait is also in the counts of the bare loop, so it does not change a difference.
    """
    counts = Counter(names)
    return Counts(
        numbers=counts["aten::_local_scalar_dense"],
        waits=sum(counts[name] for name in WAITS),
        kernels=sum(number for name, number in counts.items() if name.startswith(LAUNCHES)),
    )


def calls_added(parameters: int, **options: Any) -> int:
    """Counts the ATen calls that a watcher adds to a step, including those for its record."""
    return _small_step(parameters, options, True).calls - _small_step(parameters, None).calls


def numbers_added(**options: Any) -> int:
    """Counts how often a watcher reads a number, with an accelerator's code path on the CPU."""
    with late_readings(polls=3):
        return _small_step(10, options).numbers - _small_step(10, None).numbers


def _small_step(parameters: int, options: dict[str, Any] | None, recorded: bool = False) -> Counts:
    tensors = {f"p{i}": torch.ones(2, requires_grad=True) for i in range(parameters)}
    optimizer = torch.optim.SGD(tensors.values(), lr=0.1)

    def step() -> None:
        torch.stack(torch._foreach_norm(list(tensors.values()))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    if options is None:
        for _ in range(STEPS_BEFORE):
            step()
        return count_cpu(step)
    with gradwatch.watch(tensors, optimizer, **options) as watcher:
        for _ in range(STEPS_BEFORE):
            step()
        watcher.flush()
        return count_cpu(lambda: (step(), watcher.flush() if recorded else None))

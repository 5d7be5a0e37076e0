"""Computing with a user's model while what a training relies on stays as it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def undisturbed_random(seed: int, tensors: Iterable[Tensor]) -> Iterator[None]:
    """Runs with torch's random numbers started at a seed, and puts their state back.

    Args:
        seed: The seed.
        tensors: Those whose devices take part besides the CPU.
    """
    devices = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        yield


@contextmanager
def undisturbed_buffers(model: nn.Module) -> Iterator[None]:
    """Puts the buffers back as they were, running statistics say, where they have changed."""
    saved = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, values in saved:
            if not torch.equal(buffer, values):
                buffer.data.copy_(values)  # .data: a graph that saved it has what it saved
            if module._buffers.get(name) is not buffer:
                module._buffers[name] = buffer


@contextmanager
def without_tensor_hooks(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Takes off the hooks that see a gradient on its way, and hangs them back as they were.

    ``torch.autograd.grad`` calls these, unlike those that wait for ``.grad``: a hook that scales a
    gradient would scale the Hessian, one that keeps a norm would keep that of another backward.
    """
    hooked: list[tuple[Any, Any]] = [(t, t._backward_hooks) for t in tensors if t._backward_hooks]
    try:
        for tensor, _ in hooked:
            tensor._backward_hooks = None
        yield
    finally:
        for tensor, hooks in hooked:
            tensor._backward_hooks = hooks

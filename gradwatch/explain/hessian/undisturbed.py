"""Computing with a user's model while what a training relies on stays as it is."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradwatch.observe.data_parallel import all_wrappers
from gradwatch.observe.ranks import is_distributed

_HAS_BACKWARD = (
    "The function that computes the loss ran a backward itself, or set a .grad. Its gradients were "
    "thrown away. Return the loss, and leave out loss.backward()."
)


@contextmanager
def undisturbed_random(seed: int, tensors: Iterable[Tensor]) -> Iterator[None]:
    """Runs with torch's random numbers started at a seed, and puts their state back.

    The states of Python's own and of NumPy's are put back too; they are not started anew.

    Args:
        seed: The seed.
        tensors: Those whose devices take part besides the CPU.
    """
    devices = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            torch.default_generator.manual_seed(seed)
            for device in devices:
                torch.cuda.default_generators[device].manual_seed(seed)
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


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


@contextmanager
def undisturbed_gradients(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Keeps the gradients out of reach, and puts the same ones back.

    Raises:
        RuntimeError: If there are others at the end.
    """
    saved = [tensor.grad for tensor in tensors]
    for tensor in tensors:
        tensor.grad = None
    try:
        yield
        if any(tensor.grad is not None for tensor in tensors):
            raise RuntimeError(_HAS_BACKWARD)
    finally:
        for tensor, gradient in zip(tensors, saved, strict=True):
            tensor.grad = gradient


@contextmanager
def undisturbed_communication() -> Iterator[None]:
    """Has no wrapper of the process talk to other ranks, nor expect a backward to follow.

    ``DistributedDataParallel`` waits for the backward of every forward that it means to reduce, and
    ``torch.autograd.grad`` is none that it would notice: its next forward would refuse to run. A
    loss may call others than that of the model, the critic of a generator say.
    """
    flags = ("require_backward_grad_sync", "require_forward_param_sync")
    there = all_wrappers() if is_distributed() else []
    wrappers = [one for one in there if all(hasattr(one, flag) for flag in flags)]
    saved = [[getattr(wrapper, flag) for flag in flags] for wrapper in wrappers]
    try:
        for wrapper in wrappers:
            for flag in flags:
                setattr(wrapper, flag, False)
        yield
    finally:
        for wrapper, values in zip(wrappers, saved, strict=True):
            for flag, value in zip(flags, values, strict=True):
                setattr(wrapper, flag, value)

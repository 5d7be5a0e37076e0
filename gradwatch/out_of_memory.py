"""Running out of memory: knowing the error, freeing the memory, taking the batch back."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradwatch.measure.parameters import local_part

# Those of torch that are no torch.OutOfMemoryError; each is a part of the message.
MESSAGES = (
    # c10's allocator on the CPU: of Linux and macOS, then of Windows (c10/core/impl/alloc_cpu.cpp).
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    # A C++ container that found no memory: torch makes a RuntimeError of any std::exception.
    "std::bad_alloc",
    # CUDA, HIP and XPU before torch.OutOfMemoryError, and allocators of other makers.
    "out of memory. Tried to allocate",
    # Metal (aten/src/ATen/mps/MPSAllocator.mm), still a RuntimeError.
    "MPS backend out of memory",
    # The driver, past torch's allocator: a torch.AcceleratorError of a newer torch.
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "HIP error: out of memory",
    "UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY",
    # The allocator has no memory left and, on some machines, fails to find out how much there was
    # (pytorch issue 112377).
    "NVML_SUCCESS == r INTERNAL ASSERT FAILED",
    # A kernel that Triton loads, as torch.compile makes them; on HIP it writes "Messsage: ...".
    "Triton Error [CUDA]: out of memory",
    "sage: out of memory",
    # Workspaces and handles of cuDNN, cuBLAS, cuSPARSE, cuSOLVER and their HIP namesakes; cuFFT.
    "_STATUS_ALLOC_FAILED",
    "CUFFT_ALLOC_FAILED",
    # cuDNN 8 tries one engine after the other and swallows why each of them failed; with no
    # memory left all do (pytorch issue 108645). Where it is another reason, less does not help.
    "unable to find an engine to execute this computation",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Tells whether an error, or what it was raised ``from``, says that memory ran out.

    Returns:
        True if running less at a time may help.
    """
    return any(_says_out_of_memory(one) for one in _chain(error, contexts=False))


def forget(error: BaseException) -> None:
    """Lets go of the activations that an error holds: those in the frames of its traceback.

    Call it before running again, in a place where no variable holds a result of the failed run;
    the error, and what it came from, has no traceback afterwards.
    """
    for one in _chain(error, contexts=True):
        # A frame may outlive the traceback, in a generator or a debugger: clear both.
        traceback.clear_frames(one.__traceback__)
        one.__traceback__ = None


def release_memory(devices: Iterable[torch.device]) -> None:
    """Frees what nothing refers to: reference cycles, and the caches of the devices' allocators.

    Args:
        devices: Those in use. A kind that is not among them is not touched, let alone initialised.
    """
    gc.collect()  # a traceback and its frames hold each other
    for kind in {device.type for device in devices}:
        empty_cache = getattr(getattr(torch, kind, None), "empty_cache", None)
        if empty_cache is not None:
            empty_cache()


class Rollback:
    """What running a batch changes, taken before, so that running it again is the first time.

    That is: gradients, buffers (running statistics), and the generators of torch. Parameters and
    optimizer state do not change before the step; the generators of Python and numpy do not belong
    to torch.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        modules: Iterable[nn.Module],
        devices: Iterable[torch.device],
    ) -> None:
        """Copies it; nearly free where no parameter has a gradient.

        Args:
            parameters: The leaf tensors that a backward leaves gradients in.
            modules: Those whose buffers may change: ``model.modules()``, or those in training.
            devices: Those whose generators may be used, besides the CPU's.
        """
        # Gradients go to the CPU: the device is short of memory. Buffers are small and stay on
        # their device, as copying each of them to the CPU would wait for it each time.
        # ``_buffers`` is private, but named_buffers() leaves out those that are None so far, and
        # says of none where to put it back (torch 2.4 to 2.13).
        with torch.no_grad():
            self._gradients = [(p, p.grad, _on_cpu(p.grad)) for p in parameters]
            self._buffers = [
                (module, name, buffer, None if buffer is None else local_part(buffer).clone())
                for module in modules
                for name, buffer in module._buffers.items()
            ]
        self._generators = list(_generators(devices))

    def restore(self) -> None:
        """Puts it back, in place: whoever holds a gradient or a buffer sees the old values."""
        with torch.no_grad():
            for parameter, gradient, values in self._gradients:
                _fill(gradient, values)
                if parameter.grad is not gradient:
                    parameter.grad = gradient
            for module, name, buffer, values in self._buffers:
                _fill(buffer, values)
                module._buffers[name] = buffer  # a module may have put another tensor there
        for set_state, state in self._generators:
            set_state(state)


def _says_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in MESSAGES)


def _chain(error: BaseException, contexts: bool) -> Iterator[BaseException]:
    seen: set[int] = set()  # ids, as errors may be raised from each other in a circle
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        waiting.append(one.__cause__)
        if contexts:
            waiting.append(one.__context__)


def _on_cpu(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else local_part(gradient).to("cpu", copy=True)


def _fill(tensor: Tensor | None, values: Tensor | None) -> None:
    if tensor is not None and values is not None:
        local_part(tensor).copy_(values)


def _generators(
    devices: Iterable[torch.device],
) -> Iterator[tuple[Callable[[Tensor], None], Tensor]]:
    yield torch.set_rng_state, torch.get_rng_state()
    for device in set(devices):
        backend: Any = getattr(torch, device.type, None)
        if hasattr(backend, "get_rng_state"):
            yield partial(backend.set_rng_state, device=device), backend.get_rng_state(device)

"""Running out of memory: recognizing the error, freeing memory, undoing a failed batch."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from gradwatch.hooks.generators import torch_generators
from gradwatch.measure.parameters import local_part

# Parts of the messages of errors that are not a torch.OutOfMemoryError.
MESSAGES = (
    # c10's CPU allocator on Linux and macOS, then on Windows (c10/core/impl/alloc_cpu.cpp).
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    # A C++ container: torch turns any std::exception into a RuntimeError.
    "std::bad_alloc",
    # CUDA, HIP and XPU before torch.OutOfMemoryError existed, and allocators of other vendors.
    "out of memory. Tried to allocate",
    # Metal (aten/src/ATen/mps/MPSAllocator.mm), still a RuntimeError.
    "MPS backend out of memory",
    # The driver itself, not torch's allocator: in newer versions a torch.AcceleratorError.
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "HIP error: out of memory",
    "UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY",
    # The allocator has no memory left and, on some machines, then fails to query how much there is
    # (pytorch issue 112377).
    "NVML_SUCCESS == r INTERNAL ASSERT FAILED",
    # Loading a Triton kernel (torch.compile); on HIP the text contains "Messsage: ..." [sic].
    "Triton Error [CUDA]: out of memory",
    "sage: out of memory",
    # Workspaces and handles of cuDNN, cuBLAS, cuSPARSE, cuSOLVER and their HIP versions; cuFFT.
    "_STATUS_ALLOC_FAILED",
    "CUFFT_ALLOC_FAILED",
    # cuDNN 8 tries one engine after another and hides why each of them failed; without memory all
    # of them fail (pytorch issue 108645). If the reason was another one, a smaller batch fails too.
    "unable to find an engine to execute this computation",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error, or one that it was raised ``from``, says that memory ran out.

    If so, a smaller micro-batch may help.
    """
    return any(_says_out_of_memory(one) for one in _chain(error, contexts=False))


def forget(error: BaseException) -> None:
    """Frees the activations that an error keeps alive through the frames of its traceback.

    Call it before running again, where no variable holds a result of the failed run. Afterwards the
    error, and the errors that led to it, have no traceback.
    """
    for one in _chain(error, contexts=True):
        # A frame may outlive the traceback, in a generator or a debugger: clear both.
        traceback.clear_frames(one.__traceback__)
        one.__traceback__ = None


def release_memory(devices: Iterable[torch.device]) -> None:
    """Collects reference cycles, and empties the caches of the devices' memory allocators.

    Args:
        devices: The devices in use. Other kinds of device are not touched, so not initialized.
    """
    gc.collect()  # a traceback and its frames hold each other
    for kind in {device.type for device in devices}:
        empty_cache = getattr(getattr(torch, kind, None), "empty_cache", None)
        if empty_cache is not None:
            empty_cache()


class Rollback:
    """A copy of everything that running a batch changes, so that it can be undone.

    These are gradients, buffers (such as running statistics) and torch's random number generators.
    Parameters and optimizer state do not change before the step. The generators of Python and NumPy
    are not torch's, and are not included.
    """

    def __init__(self, parameters: Sequence[Tensor], modules: Iterable[nn.Module]) -> None:
        """Makes the copy; nearly free if no parameter has a gradient.

        Args:
            parameters: The leaf tensors that receive gradients.
            modules: The modules whose buffers may change: ``model.modules()``, or those in
                training mode.
        """
        # Gradients are copied to the CPU, because the device is short of memory. Buffers are small
        # and are copied on their device: each copy to the CPU would wait for it. ``_buffers`` is
        # private, but named_buffers() omits buffers that are None so far, and does not say which
        # module to restore a buffer in (torch 2.4 to 2.13).
        with torch.no_grad():
            self._gradients = [(p, p.grad, _on_cpu(p.grad)) for p in parameters]
            self._buffers = [
                (module, name, buffer, None if buffer is None else local_part(buffer).clone())
                for module in modules
                for name, buffer in module._buffers.items()
            ]
        self._generators = [(one, one.get_state()) for one in torch_generators()]

    def restore(self) -> None:
        """Restores the copy in place, so that references to gradients and buffers stay valid."""
        with torch.no_grad():
            for parameter, gradient, values in self._gradients:
                _fill(gradient, values)
                if parameter.grad is not gradient:
                    parameter.grad = gradient
            for module, name, buffer, values in self._buffers:
                _fill(buffer, values)
                module._buffers[name] = buffer  # the module may have replaced the tensor
        for generator, state in self._generators:
            generator.set_state(state)


def _says_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in MESSAGES)


def _chain(error: BaseException, contexts: bool) -> Iterator[BaseException]:
    seen: set[int] = set()  # ids of errors: causes and contexts may form a cycle
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

"""A batch that is run in micro-batches which fit into memory, found by halving."""

from __future__ import annotations

import gc
import math
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradwatch.accumulate.splitting import batch_length, largest_part
from gradwatch.hooks.data_parallel import broadcast_buffers, can_hold
from gradwatch.managed import ManagedLoop
from gradwatch.measure.deferred import as_operand
from gradwatch.measure.sharded import local_part
from gradwatch.record.events import out_of_memory_event
from gradwatch.step.optimizer_steps import OptimizerSteps
from gradwatch.step.run import Run

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
    """Tells whether an error says that memory ran out, on whatever device.

    Args:
        error: What was raised; what it was raised ``from`` counts too.

    Returns:
        True if running less at a time may help.
    """
    return any(_says_out_of_memory(one) for one in _chain(error, contexts=False))


def forget(error: BaseException) -> None:
    """Lets go of the activations that an error holds: those in the frames of its traceback.

    Call it before running again, in a place where no variable holds a result of the failed run;
    the error has no traceback afterwards.

    Args:
        error: What was raised; what it came from is forgotten too.
    """
    for one in _chain(error, contexts=True):
        traceback.clear_frames(one.__traceback__)
        one.__traceback__ = None


def release_memory(devices: Iterable[torch.device]) -> None:
    """Frees what nothing refers to: reference cycles, and the caches of the devices' allocators.

    Args:
        devices: Those in use. A kind that is not among them is not touched, let alone initialised.
    """
    gc.collect()
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

        Gradients are copied to the CPU: the device is short of memory. Buffers stay on their
        device, as they are small, and copying each of them to the CPU would wait for it each time.

        Args:
            parameters: The leaf tensors that a backward leaves gradients in.
            modules: Those whose buffers may change: ``model.modules()``, or those in training.
            devices: Those whose generators may be used, besides the CPU's.
        """
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
    seen: set[int] = set()
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


Closure = Callable[[Any], "Tensor | tuple[Tensor, float | Tensor]"]

CALL = "watcher.run_batch"
NO_LOSS = (
    "The closure of watcher.run_batch() must return the mean loss of the micro-batch that it is "
    "given, a tensor of one element, or the pair of it and a weight, got {result}."
)
ELSEWHERE = (
    "Another rank ran out of memory with a micro-batch of one example, so that the batch cannot be "
    "run. Use a smaller model, shorter examples or activation checkpointing."
)


class BatchRunner:
    """Halves the micro-batch when memory runs out, and runs the same batch again.

    Attributes:
        size: The most examples that a micro-batch may have; None while memory has sufficed.
    """

    def __init__(
        self, run: Run, managed: ManagedLoop, model: nn.Module | Mapping[str, Tensor]
    ) -> None:
        """Starts with whole batches.

        Args:
            run: The run.
            managed: Runs the backwards.
            model: Its buffers are put back where a batch is run again.
        """
        self.size: int | None = None
        self._run = run
        self._managed = managed
        self._modules = list(model.modules()) if isinstance(model, nn.Module) else []
        self._devices = {tensor.device for tensor in run.table.tensors}

    def run(self, tracks: Sequence[OptimizerSteps], closure: Closure, batch: Any) -> Tensor:
        """Runs a batch; see :meth:`gradwatch.watcher.Watcher.run_batch`."""
        length = batch_length(batch, CALL)
        if not self._may_run_again:
            return self._run_parts(tracks, closure, batch, self._size(length))
        self._communicate_ahead(length)
        while True:
            size = self._size(length)
            start = _Start(self._run, self._managed, tracks, self._modules, self._devices)
            loss, error = self._attempt(start, tracks, closure, batch, size)
            too_large = self._smallest_of_ranks(None if error is None else size)
            if too_large is None:
                return loss
            start.go_back()
            if too_large == 1:
                raise _last_error(error, size)
            del start, error, loss  # they would be there beside the next attempt
            self._halve(too_large, tracks[0].step + 1)

    # -- one attempt -----------------------------------------------------------------------------

    def _attempt(
        self,
        start: _Start,
        tracks: Sequence[OptimizerSteps],
        closure: Closure,
        batch: Any,
        size: int,
    ) -> tuple[Tensor, Exception | None]:
        """Runs a batch once; returns its loss, and the error where memory ran out."""
        try:
            with self._managed.all_held_back():
                return self._run_parts(tracks, closure, batch, size), None
        except BaseException as error:
            if isinstance(error, Exception) and is_out_of_memory(error):
                if size > 1:  # else it will be raised, with its story
                    forget(error)
                return torch.zeros(()), error
            start.go_back()
            raise

    def _run_parts(
        self, tracks: Sequence[OptimizerSteps], closure: Closure, batch: Any, size: int
    ) -> Tensor:
        loss_sum = torch.zeros(())
        weight_sum: float | Tensor = 0.0
        for part in self._managed.micro_batches(tracks, batch, size, "run_batch"):
            loss, weight = self._run_part(tracks, closure, part)
            loss_sum = loss_sum + loss * weight
            weight_sum = weight_sum + weight
        return loss_sum / (weight_sum + (weight_sum == 0))

    def _run_part(
        self, tracks: Sequence[OptimizerSteps], closure: Closure, part: Any
    ) -> tuple[Tensor, float | Tensor]:
        """Runs a micro-batch; the graph of its loss ends here, before the next one has begun."""
        loss, weight = _loss_and_weight(closure(part))
        self._managed.backward(tracks, loss, weight)
        wide = torch.promote_types(loss.dtype, torch.float32)
        return loss.detach().reshape(()).to(wide), as_operand(self._managed.newest_weight)

    # -- what the ranks do together --------------------------------------------------------------

    @property
    def _may_run_again(self) -> bool:
        """Whether a rank can run a batch again: not while the others wait for it in the middle.

        FSDP2 gathers parameters in each forward, SyncBatchNorm statistics, and a static graph
        reduces gradients in its first backward.
        """
        ranks = self._run.data_parallel
        if ranks is None or self._run.shards is not None:
            return self._run.shards is None
        synced = any(isinstance(module, nn.SyncBatchNorm) for module in self._modules)
        return not synced and all(map(can_hold, ranks.wrappers))

    def _communicate_ahead(self, length: int) -> None:
        """Leaves nothing to communicate until each rank has run its batch, or failed to."""
        ranks = self._run.data_parallel
        if ranks is not None:
            self._managed.agree(float(length))
            broadcast_buffers(ranks.wrappers)

    def _smallest_of_ranks(self, failed: int | None) -> int | None:
        """Returns the smallest micro-batch that failed on any rank; None where the batch has run.

        Args:
            failed: The one that failed on this rank.
        """
        ranks = self._run.data_parallel
        if ranks is None:
            return failed
        device = self._run.table.tensors[0].device
        told = torch.tensor([-math.inf if failed is None else -float(failed)], device=device)
        smallest = -ranks.largest_(told).item()
        return None if math.isinf(smallest) else int(smallest)

    # -- sizes -----------------------------------------------------------------------------------

    def _size(self, length: int) -> int:
        return largest_part(length, min(self.size or length, length))

    def _halve(self, too_large: int, step: int) -> None:
        release_memory(self._devices)
        self.size = (too_large + 1) // 2
        self._run.note(out_of_memory_event(step, too_large, self.size))


class _Start:
    """Where a batch begins, to go back to: gradients, buffers, random numbers, the window."""

    def __init__(
        self,
        run: Run,
        managed: ManagedLoop,
        tracks: Sequence[OptimizerSteps],
        modules: Sequence[nn.Module],
        devices: set[torch.device],
    ) -> None:
        self._added = run.hooks.added
        self._tracks = tracks
        self._rollback = Rollback(run.table.tensors, modules, devices)
        self._marks = [managed.mark(), *(track.mark() for track in tracks)]

    def go_back(self) -> None:
        self._rollback.restore()
        for put_back in self._marks:
            put_back()
        for track in self._tracks:
            track.window.gradients_put_back()
        self._added.begin()  # it holds gradients of a backward that failed
        self._added.active = any(track.window.micro_batches for track in self._tracks)


def _last_error(error: Exception | None, size: int) -> Exception:
    """Returns what to raise where some rank cannot run even one example."""
    if error is not None and size == 1:
        return error
    elsewhere = RuntimeError(ELSEWHERE)
    elsewhere.__cause__ = error
    return elsewhere


def _loss_and_weight(result: object) -> tuple[Tensor, float | Tensor | None]:
    loss, weight = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss, weight
    raise TypeError(NO_LOSS.format(result=_described(result)))


def _described(result: object) -> str:
    if isinstance(result, Tensor):
        return f"a tensor of shape {list(result.shape)}"
    if isinstance(result, tuple):
        return f"({', '.join(map(_described, result))})"
    return f"{result!r:.100} of type {type(result).__name__}"

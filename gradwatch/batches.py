"""BatchRunner: runs a batch in micro-batches that fit into memory, and finds out which do."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradwatch.control.buffer_sync import broadcast_buffers
from gradwatch.control.gradient_sync import can_hold
from gradwatch.control.out_of_memory import Rollback, forget, is_out_of_memory, release_memory
from gradwatch.control.splitting import batch_length, largest_part
from gradwatch.explain.accumulation import out_of_memory_event
from gradwatch.managed import ManagedLoop
from gradwatch.observe.readings import operand
from gradwatch.run import Run
from gradwatch.track import Track

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

    def run(self, tracks: Sequence[Track], closure: Closure, batch: Any) -> Tensor:
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
        self, start: _Start, tracks: Sequence[Track], closure: Closure, batch: Any, size: int
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
        self, tracks: Sequence[Track], closure: Closure, batch: Any, size: int
    ) -> Tensor:
        loss_sum = torch.zeros(())
        weight_sum: float | Tensor = 0.0
        for part in self._managed.micro_batches(tracks, batch, size, "run_batch"):
            loss, weight = self._run_part(tracks, closure, part)
            loss_sum = loss_sum + loss * weight
            weight_sum = weight_sum + weight
        return loss_sum / (weight_sum + (weight_sum == 0))

    def _run_part(
        self, tracks: Sequence[Track], closure: Closure, part: Any
    ) -> tuple[Tensor, float | Tensor]:
        """Runs a micro-batch; the graph of its loss ends here, before the next one has begun."""
        loss, weight = _loss_and_weight(closure(part))
        self._managed.backward(tracks, loss, weight)
        wide = torch.promote_types(loss.dtype, torch.float32)
        return loss.detach().reshape(()).to(wide), operand(self._managed.newest_weight)

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
        tracks: Sequence[Track],
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

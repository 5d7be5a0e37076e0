"""BatchRunner: runs a batch in micro-batches that fit into memory, and finds out which do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradwatch.control.out_of_memory import Rollback, forget, is_out_of_memory, release_memory
from gradwatch.control.splitting import batch_length
from gradwatch.explain.accumulation import out_of_memory_event
from gradwatch.managed import ManagedLoop
from gradwatch.observe.readings import operand
from gradwatch.run import Run
from gradwatch.track import Track

Closure = Callable[[Any], "Tensor | tuple[Tensor, float | Tensor]"]

CALL = "watcher.run_batch"
NO_LOSS = (
    "The closure of watcher.run_batch() must return the mean loss of the micro-batch that it is "
    "given, a tensor of one element, or the pair of it and a weight, got {result!r}."
)
ELSEWHERE = (
    "Another rank ran out of memory with micro-batches of one example, and stopped. Use a smaller "
    "model, shorter examples or activation checkpointing."
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
        self._failed_at = 0
        self._run = run
        self._managed = managed
        self._modules = list(model.modules()) if isinstance(model, nn.Module) else []

    def run(self, tracks: Sequence[Track], closure: Closure, batch: Any) -> Tensor:
        """Runs a batch; see :meth:`gradwatch.watcher.Watcher.run_batch`."""
        length = batch_length(batch, CALL)
        devices = {tensor.device for tensor in self._run.table.tensors}
        while True:
            size = min(self.size or length, length)
            rollback = Rollback(self._run.table.tensors, self._modules, devices)
            marks = [track.mark() for track in tracks] + [self._managed.mark()]
            failed, loss = self._attempt(tracks, closure, batch, size)
            if self._fits(failed is None, size):
                return loss
            for put_back in marks:
                put_back()
            rollback.restore()
            self._run.hooks.added.begin()
            self._give_up_at_one(failed)
            del rollback, failed, marks
            release_memory(devices)
            event = out_of_memory_event(tracks[0].step + 1, size, self.size or 1)
            self._run.recorder.note((event,))

    def _attempt(
        self, tracks: Sequence[Track], closure: Closure, batch: Any, size: int
    ) -> tuple[BaseException | None, Tensor]:
        weights: list[float | Tensor] = []
        losses: list[Tensor] = []
        try:
            with self._managed.all_held_back():
                for part in self._managed.micro_batches(tracks, batch, size, "run_batch"):
                    loss, weight = _loss_and_weight(closure(part))
                    self._managed.backward(tracks, loss, weight)
                    weights.append(operand(self._managed.newest_weight))
                    losses.append(loss.detach())
        except Exception as error:
            # FSDP2 gathers parameters in each forward: the other ranks are waiting for this one.
            if not is_out_of_memory(error) or self._run.shards is not None:
                raise
            if size > 1:  # else it is raised, with its story
                forget(error)
            return error, torch.zeros(())
        total = sum(weights) or 1.0
        parts = [loss * (weight / total) for loss, weight in zip(losses, weights, strict=True)]
        return None, torch.stack(parts).sum()

    def _fits(self, here: bool, size: int) -> bool:
        """Agrees with the other ranks on whether the batch has run, and else on a smaller size."""
        ranks, everywhere = self._run.data_parallel, here
        if ranks is not None and self._run.shards is None:
            device = self._run.table.tensors[0].device
            told = torch.tensor([float(not here), float(size)], device=device)
            failed, size = map(int, ranks.largest_(told).tolist())
            everywhere = not failed
        if not everywhere:
            self._failed_at = size
            self.size = max(1, (size + 1) // 2)
        return everywhere

    def _give_up_at_one(self, failed: BaseException | None) -> None:
        if self._failed_at == 1:
            raise failed if failed is not None else RuntimeError(ELSEWHERE)


def _loss_and_weight(result: object) -> tuple[Tensor, float | Tensor | None]:
    if isinstance(result, Tensor) and result.numel() == 1:
        return result, None
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], Tensor):
        return result
    raise TypeError(NO_LOSS.format(result=result))

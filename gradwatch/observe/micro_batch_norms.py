"""MicroBatchNorms: what one micro-batch adds to the gradients, where ``.grad`` holds a sum."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from gradwatch.observe.norms import gradient_norms, total_norm

HELD_BYTES = 2**20  # so many are still in the cache, and their memory is soon used again


class MicroBatchNorms:
    """Measures each gradient before it is added to what is there already.

    A hook of a tensor sees what a backward adds to it. Measuring there would take one small call
    per parameter; so gradients are kept until a megabyte has come, or the backward ends, and are
    measured in one batched call. A gradient that is kept cannot be moved into ``.grad`` but has
    to be copied, which is why nothing is kept while ``.grad`` is still empty: the sum that stands
    there afterwards is what the first micro-batch added.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Watches nothing yet.

        Args:
            tensors: The tensors of the parameter table.
        """
        self.active = False
        self.watching = False
        self._tensors = tensors
        self._handles: dict[int, RemovableHandle] = {}
        self._held: dict[int, Tensor] = {}
        self._held_bytes = 0
        self._task = -1
        self._measured: list[tuple[list[int], Tensor]] = []

    def watch(self, indices: Iterable[int]) -> None:
        """Hangs hooks on tensors, once each, as far as they require a gradient.

        Args:
            indices: The tensors.
        """
        self.watching = True
        for index in indices:
            if index not in self._handles and self._tensors[index].requires_grad:
                tensor = self._tensors[index]
                hook = partial(self._see, index, tensor.numel() * tensor.element_size())
                self._handles[index] = tensor.register_hook(hook)  # type: ignore[no-untyped-call]

    def detach(self) -> None:
        """Takes the hooks off; safe to call again."""
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}
        self.watching = False
        self.begin()

    def begin(self) -> None:
        """Forgets what an earlier backward has left."""
        self._held, self._held_bytes, self._measured = {}, 0, []

    def total(self, indices: Sequence[int]) -> Tensor | None:
        """Returns the norm of what the backward that has just ended added to some tensors.

        Args:
            indices: The tensors.

        Returns:
            Tensor ``[]``, in the unit of the gradients; None where nothing was kept.
        """
        self._measure()
        if not self._measured:
            return None
        wanted = set(indices)
        parts = [
            norms if wanted.issuperset(there) else norms[[index in wanted for index in there]]
            for there, norms in self._measured
        ]
        return total_norm(torch.cat(parts))

    def _see(self, index: int, size: int, gradient: Tensor) -> None:
        if not self.active:
            return
        task: int = torch._C._current_graph_task_id()
        if task != self._task:  # what a backward that failed has left does not belong here
            self.begin()
            self._task = task
        self._held[index] = gradient
        self._held_bytes += size
        if self._held_bytes > HELD_BYTES:
            self._measure()

    @torch.no_grad()
    def _measure(self) -> None:
        if self._held:
            norms = gradient_norms(list(self._held.values()))
            self._measured.append((list(self._held), norms))
            self._held, self._held_bytes = {}, 0

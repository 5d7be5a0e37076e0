"""What hangs on a watched model: marks of arrival, and hooks that measure what is gone later."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from gradwatch.hooks.backward import Arrivals, Backward, on_accumulated, on_incoming
from gradwatch.hooks.data_parallel import fully_sharded
from gradwatch.measure.deferred import Deferred
from gradwatch.measure.norms import Measurement, gradient_norms, total_norm
from gradwatch.measure.parameters import ParameterTable


class ModelHooks:
    """Tells what arrives in each backward, and measures what is gone at its end.

    Attributes:
        local: This rank's own norms; None where the model is not wrapped for data parallelism.
        added: What each backward adds to the gradients; hooks are hung by :meth:`watch_added`.
        freed: Measures gradients that are gone at the end of a backward.
        unhooked: Parameters that require no gradient yet, and so have no mark.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        table: ParameterTable,
        on_backward: Callable[[Backward], None],
        on_arrived: Callable[[], None],
    ) -> None:
        """Hangs nothing yet.

        Args:
            model: The watched model.
            table: Its tensors.
            on_backward: Called at the end of each backward, when every ``.grad`` is final.
            on_arrived: Called before it, when nothing has been reduced over ranks yet.
        """
        self.unhooked: set[int] = set()
        self.local = LocalNorms.of(model, table)
        self.added = MicroBatchNorms(table.tensors)
        self.freed = FreedGradients(table.tensors)
        self._model = model
        self._table = table
        self._arrivals = Arrivals(on_backward, None if self.local is None else on_arrived)
        self._watches_added = False
        self._output_hook: RemovableHandle | None = None

    def hooked(self, index: int) -> bool:
        """Tells whether the arrival of a parameter will be noticed."""
        return self._arrivals.hooked(index)

    def attach(self, indices: Sequence[int], norm_type: float, owned: bool) -> None:
        """Hangs the hooks.

        Args:
            indices: Parameters to watch.
            norm_type: The p of the norms.
            owned: Whether it is known which optimizers step them.
        """
        if not owned:
            # Before the marks, so that what hangs on a parameter now is not ours.
            self.freed.attach(indices, norm_type)
        self.watch_also(indices)
        if _holds_gradients_back(self._model):
            self._output_hook = self._model.register_forward_hook(self._hook_output)
        if self.local is not None:
            self.local.attach(norm_type)

    def detach(self) -> None:
        """Removes every hook; safe to call again."""
        self._arrivals.unhook()
        self.freed.detach()
        self.added.detach()
        self.unhooked = set()
        if self._output_hook is not None:
            self._output_hook.remove()
            self._output_hook = None
        if self.local is not None:
            self.local.detach()

    def watch_also(self, indices: Sequence[int]) -> list[int]:
        """Hangs marks on further parameters, as soon as they require a gradient.

        Returns:
            Those that have a gradient already: they arrived before they had a mark.
        """
        self.unhooked.update(index for index in indices if not self.hooked(index))
        return self.hook_thawed()

    def hook_thawed(self) -> list[int]:
        """Hangs marks on the parameters that require a gradient by now.

        Returns:
            Those of them that have a gradient already.
        """
        tensors = self._table.tensors
        thawed = sorted(index for index in self.unhooked if tensors[index].requires_grad)
        for index in thawed:
            self._arrivals.hook(index, tensors[index])
        if self._watches_added:
            self.added.watch(thawed)
        self.unhooked.difference_update(thawed)
        return [index for index in thawed if tensors[index].grad is not None]

    def watch_added(self) -> None:
        """Hangs hooks that measure what each backward adds, here and on what is watched later."""
        # With FSDP2 they would never be called: there a backward adds to whole gradients, which no
        # parameter holds.
        if not self._watches_added and self._output_hook is None:
            self._watches_added = True
            self.added.watch(self._arrivals.hooked_indices())

    def _hook_output(self, module: nn.Module, args: Any, output: Any) -> None:
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                on_incoming(leaf, self._begin_backward)

    def _begin_backward(self, gradient: Tensor) -> None:
        # Taking a hook off the model does not take it off graphs that were built before.
        if self._output_hook is not None:
            self._arrivals.begin()


def _holds_gradients_back(model: nn.Module | Mapping[str, Tensor]) -> TypeGuard[nn.Module]:
    """Tells whether a backward may end without an arrival: only its passing the output shows it."""
    # FSDP2 calls no hook of a parameter in a micro-batch that does not communicate.
    if not isinstance(model, nn.Module) or next(fully_sharded(model), None) is None:
        return False
    # Inside a compiled call the hook would be traced, and break the graph.
    return model._compiled_call_impl is None


class _TensorHooks:
    """One hook on each of some tensors of the parameter table."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._norm_type = 2.0
        self._handles: dict[int, RemovableHandle] = {}

    def _hook(
        self,
        indices: Iterable[int],
        call: Callable[[int, Tensor], None],
        register: Callable[[Tensor, Callable[[Tensor], None]], RemovableHandle] = on_incoming,
    ) -> None:
        """Has ``call`` called with an index and what ``register`` gives, once per tensor."""
        for index in indices:
            tensor = self._tensors[index]
            if index not in self._handles and tensor.requires_grad:
                self._handles[index] = register(tensor, partial(call, index))

    def detach(self) -> None:
        """Removes the hooks; safe to call again."""
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}


Parts = list[tuple[list[int], Tensor]]


def _total(parts: Parts, indices: Sequence[int], norm_type: float) -> Tensor | None:
    """Combines the norms of some tensors, measured in parts; None where nothing was."""
    wanted = set(indices)
    norms = [
        norms if wanted.issuperset(there) else norms[[index in wanted for index in there]]
        for there, norms in parts
    ]
    return total_norm(torch.cat(norms), norm_type) if norms else None


class FreedGradients(_TensorHooks):
    """Measures each gradient before it reaches the parameter, where it is gone afterwards.

    Where no gradient is left from an earlier backward, what reaches the parameter is its gradient.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Watches nothing yet."""
        super().__init__(tensors)
        self._norms: dict[int, Tensor] = {}

    def attach(self, indices: Iterable[int], norm_type: float) -> None:
        """Begins with the parameters that a hook of the user is waiting for already.

        Args:
            indices: The watched parameters, which carry no hook of gradwatch yet.
            norm_type: The p of the norms.
        """
        self._norm_type = norm_type
        # An optimizer that steps inside the backward does so in such a hook. Private, as torch has
        # no way to ask for them (torch 2.4 to 2.13); without it the first step would not be seen.
        hooked = [i for i in indices if getattr(self._tensors[i], "_post_accumulate_grad_hooks", 0)]
        self._hook(hooked, self._see)

    def take(self, arrived: Sequence[int]) -> dict[int, Tensor]:
        """Returns the norms of the gradients that are gone at the end of a backward.

        Args:
            arrived: The parameters that received one.

        Returns:
            Tensors ``[]`` by index. Where one is missing, the next backward will have it.
        """
        norms, self._norms = self._norms, {}
        gone = [index for index in arrived if self._tensors[index].grad is None]
        self._hook(gone, self._see)
        return {index: norms[index] for index in gone if index in norms}

    @torch.no_grad()
    def _see(self, index: int, gradient: Tensor) -> None:
        self._norms[index] = gradient_norms([gradient], self._norm_type)[0]


def with_freed(
    measurement: Measurement, freed: Mapping[int, Tensor], norm_type: float
) -> Measurement:
    """Adds the norms of gradients that are gone to those of gradients that are there.

    Args:
        measurement: What was measured at the end of the backward.
        freed: Norms by index.
        norm_type: The p of the norms.

    Returns:
        The measurement that a pass over all of them would have given.
    """
    norms = dict(zip(measurement.indices, measurement.norms.tensor.unbind(), strict=True))
    norms.update(freed)
    indices = sorted(norms)
    row = torch.stack([norms[index] for index in indices])
    return Measurement(indices, Deferred(row), Deferred(total_norm(row, norm_type)))


class LocalNorms(_TensorHooks):
    """Measures this rank's gradients at the last moment before they are reduced over ranks.

    It takes part in no reduction itself.
    """

    def __init__(self, wrappers: Sequence[DistributedDataParallel], table: ParameterTable) -> None:
        """Looks up which parameters are reduced.

        Args:
            wrappers: The wrappers that are, or are in, the watched model.
            table: The watched parameters.
        """
        super().__init__(table.tensors)
        # A reducer works on copies and writes the result into the gradients at the end of the
        # backward: until then one batched pass sees all of them. The others are measured one by
        # one as they arrive.
        self._at_end: list[tuple[DistributedDataParallel, list[int]]] = []
        self._early: dict[int, list[DistributedDataParallel]] = {}
        for ddp in wrappers:
            early = table.indices_of(_reduced_early(ddp))
            rest = set(table.indices_of(ddp.module.parameters())).difference(early)
            self._at_end.append((ddp, sorted(rest)))
            for index in early:
                self._early.setdefault(index, []).append(ddp)
        self._parts: Parts = []
        self._arriving: dict[int, Tensor] = {}

    @classmethod
    def of(
        cls, model: nn.Module | Mapping[str, Tensor], table: ParameterTable
    ) -> LocalNorms | None:
        """Makes them for a model; None where nothing in it is wrapped."""
        modules = model.modules() if isinstance(model, nn.Module) else ()
        wrappers = [module for module in modules if isinstance(module, DistributedDataParallel)]
        return cls(wrappers, table) if wrappers else None

    def attach(self, norm_type: float) -> None:
        """Hangs hooks where gradients must be measured as they arrive."""
        self._norm_type = norm_type
        self._hook(self._early, self._see, on_accumulated)

    def take(self) -> None:
        """Measures at the end of a backward, when nothing has been written back yet."""
        arrived, self._arriving = self._arriving, {}
        self._parts = [(list(arrived), torch.stack(list(arrived.values())))] if arrived else []
        for ddp, indices in self._at_end:
            found = [(i, g) for i in indices if (g := self._tensors[i].grad) is not None]
            # Under no_sync() nothing is reduced, and the gradients hold several micro-batches.
            if found and ddp.require_backward_grad_sync:
                norms = gradient_norms([gradient for _, gradient in found], self._norm_type)
                self._parts.append(([index for index, _ in found], norms))

    def total(self, indices: Sequence[int]) -> Tensor | None:
        """Returns the norm of some parameters before the newest reduction.

        Returns:
            Tensor ``[]``, in the unit of the gradients; None where nothing was reduced.
        """
        return _total(self._parts, indices, self._norm_type)

    @torch.no_grad()
    def _see(self, index: int, tensor: Tensor) -> None:
        reduces = any(ddp.require_backward_grad_sync for ddp in self._early[index])
        if reduces and tensor.grad is not None:
            self._arriving[index] = gradient_norms([tensor.grad], self._norm_type)[0]


def _reduced_early(ddp: DistributedDataParallel) -> list[Tensor]:
    """Lists the parameters whose gradients may be reduced before all have arrived."""
    # A gradient that is a view of its bucket is reduced in place, as soon as the bucket is full.
    # With static_graph=True the first reduction runs before anything else at the end.
    if ddp.gradient_as_bucket_view or ddp.static_graph:
        return list(ddp.module.parameters())
    # A sparse gradient has no bucket to be copied to.
    sparse = [module for module in ddp.module.modules() if getattr(module, "sparse", False)]
    return [parameter for module in sparse for parameter in module.parameters(recurse=False)]


_HELD_BYTES = 2**20  # so many are still in the cache, and their memory is soon used again


class MicroBatchNorms(_TensorHooks):
    """Measures each gradient before it is added to what is there already.

    A hook of a tensor sees what a backward adds to it. Measuring there would take one small call
    per parameter; so gradients are kept until a megabyte has come, or the backward ends, and are
    measured in one batched call.

    Attributes:
        active: Whether to keep gradients in the next backward.
        watching: Whether hooks hang.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Watches nothing yet."""
        super().__init__(tensors)
        # A gradient that is kept cannot be moved into .grad but has to be copied, which is why
        # nothing is kept while .grad is still empty: the sum that stands there afterwards is what
        # the first micro-batch added.
        self.active = False
        self.watching = False
        self._bytes = [tensor.numel() * tensor.element_size() for tensor in tensors]
        self._task = -1
        self.begin()

    def watch(self, indices: Iterable[int]) -> None:
        """Hangs hooks on tensors, once each, as far as they require a gradient."""
        self.watching = True
        self._hook(indices, self._see)

    def detach(self) -> None:
        """Removes the hooks; safe to call again."""
        super().detach()
        self.watching = False
        self.begin()

    def begin(self) -> None:
        """Forgets what an earlier backward has left."""
        self._held: dict[int, Tensor] = {}
        self._held_bytes = 0
        self._parts: Parts = []

    def total(self, indices: Sequence[int]) -> Tensor | None:
        """Returns the norm of what the backward that has just ended added to some tensors.

        Returns:
            Tensor ``[]``, in the unit of the gradients; None where nothing was kept.
        """
        self._measure()
        return _total(self._parts, indices, self._norm_type)

    def _see(self, index: int, gradient: Tensor) -> None:
        if not self.active:
            return
        # Private: the number of the backward. What one that failed has left does not belong here.
        task: int = torch._C._current_graph_task_id()
        if task != self._task:
            self.begin()
            self._task = task
        self._held[index] = gradient
        self._held_bytes += self._bytes[index]
        if self._held_bytes > _HELD_BYTES:
            self._measure()

    @torch.no_grad()
    def _measure(self) -> None:
        if self._held:
            norms = gradient_norms(list(self._held.values()), self._norm_type)
            self._parts.append((list(self._held), norms))
            self._held, self._held_bytes = {}, 0

"""What hangs on a watched model, to see gradients that are freed, held back, local or added to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from gradwatch.hooks.backward import Arrivals, Backward, on_accumulated
from gradwatch.hooks.data_parallel import fully_sharded
from gradwatch.measure.deferred import Deferred
from gradwatch.measure.norms import Measurement, gradient_norms, total_norm
from gradwatch.measure.parameters import ParameterTable


class FreedGradients:
    """Measures each gradient before it reaches the parameter, where it is gone afterwards.

    Where no gradient is left from an earlier backward, what reaches the parameter is its gradient.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Watches nothing yet.

        Args:
            tensors: The tensors of the parameter table.
        """
        self._tensors = tensors
        self._norm_type = 2.0
        self._handles: dict[int, RemovableHandle] = {}
        self._norms: dict[int, Tensor] = {}

    def attach(self, indices: Iterable[int], norm_type: float) -> None:
        """Begins with the parameters that a hook of the user is waiting for already.

        Args:
            indices: The watched parameters, which carry no hook of gradwatch yet.
            norm_type: The p of the norms.
        """
        self._norm_type = norm_type
        hooked = [i for i in indices if getattr(self._tensors[i], "_post_accumulate_grad_hooks", 0)]
        self.watch(hooked)

    def watch(self, indices: Iterable[int]) -> None:
        """Measures the gradients of some parameters from the next backward on."""
        for index in indices:
            if index not in self._handles and self._tensors[index].requires_grad:
                hook = partial(self._see, index)
                self._handles[index] = self._tensors[index].register_hook(hook)  # type: ignore[no-untyped-call]

    def detach(self) -> None:
        """Takes the hooks off; safe to call again."""
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}

    def take(self, arrived: Sequence[int]) -> dict[int, Tensor]:
        """Returns the norms of the gradients that are gone at the end of a backward.

        Args:
            arrived: The parameters that received one.

        Returns:
            Tensors ``[]`` by index. Where one is missing, the next backward will have it.
        """
        norms, self._norms = self._norms, {}
        gone = [index for index in arrived if self._tensors[index].grad is None]
        self.watch(gone)
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


class HeldBack:
    """Tells of every backward that passes through a model's output."""

    def __init__(self, model: nn.Module, on_backward: Callable[[], None]) -> None:
        """Hangs a hook on the model.

        Args:
            model: The model.
            on_backward: Called inside the backward, before any parameter's gradient is there.
        """
        self._on_backward = on_backward
        self._handle: RemovableHandle | None = model.register_forward_hook(self._see)

    @classmethod
    def of(
        cls, model: nn.Module | Mapping[str, Tensor], on_backward: Callable[[], None]
    ) -> HeldBack | None:
        """Makes one for a model that FSDP2 shards; None for others, which need none."""
        if not isinstance(model, nn.Module) or next(fully_sharded(model), None) is None:
            return None
        # Inside a compiled call the hook would be traced, and break the graph.
        return cls(model, on_backward) if model._compiled_call_impl is None else None

    def remove(self) -> None:
        """Takes the hook off; safe to call again."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _see(self, module: nn.Module, args: Any, output: Any) -> None:
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(self._tell)  # type: ignore[no-untyped-call]

    def _tell(self, gradient: Tensor) -> None:
        if self._handle is not None:
            self._on_backward()


class LocalNorms:
    """Measures at the last moment before the reduction; takes part in none itself.

    A reducer works on copies and writes the result into the gradients at the end of the backward:
    until then one batched pass sees all of them. With ``gradient_as_bucket_view=True`` a gradient
    may be reduced as soon as it is there, and with ``static_graph=True`` the first reduction runs
    before anything else at the end: there, and where it is sparse, each is measured by itself as it
    arrives.
    """

    def __init__(self, wrappers: Sequence[DistributedDataParallel], table: ParameterTable) -> None:
        """Looks up which parameters are reduced.

        Args:
            wrappers: The wrappers that are, or are in, the watched model.
            table: The watched parameters.
        """
        self._table = table
        self._at_once = [(ddp, table.indices_of(_reduced_at_end(ddp))) for ddp in wrappers]
        self._one_by_one = [(ddp, table.indices_of(_reduced_early(ddp))) for ddp in wrappers]
        self._norm_type = 2.0
        self._taken: list[tuple[list[int], Tensor]] = []
        self._arriving: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    @classmethod
    def of(
        cls, model: nn.Module | Mapping[str, Tensor], table: ParameterTable
    ) -> LocalNorms | None:
        """Makes them for a model; None where nothing in it is wrapped."""
        modules = model.modules() if isinstance(model, nn.Module) else ()
        wrappers = [module for module in modules if isinstance(module, DistributedDataParallel)]
        return cls(wrappers, table) if wrappers else None

    def attach(self, norm_type: float) -> None:
        """Hangs hooks where gradients must be measured as they arrive.

        Args:
            norm_type: The p of the norms.
        """
        self._norm_type = norm_type
        for ddp, indices in self._one_by_one:
            for index in indices:
                tensor = self._table.tensors[index]
                if tensor.requires_grad:
                    self._handles.append(on_accumulated(tensor, partial(self._see, ddp, index)))

    def detach(self) -> None:
        """Takes the hooks off; safe to call again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def take(self) -> None:
        """Measures at the end of a backward, when nothing has been written back yet."""
        arrived, self._arriving = self._arriving, {}
        self._taken = [(list(arrived), torch.stack(list(arrived.values())))] if arrived else []
        for ddp, indices in self._at_once:
            if ddp.require_backward_grad_sync:
                self._measure(indices)

    def total(self, indices: Sequence[int]) -> Tensor | None:
        """Returns the norm of some parameters before the newest reduction.

        Args:
            indices: The parameters.

        Returns:
            Tensor ``[]``, in the unit of the gradients; None where nothing was reduced.
        """
        wanted = set(indices)
        parts = [
            norms if wanted.issuperset(there) else norms[[index in wanted for index in there]]
            for there, norms in self._taken
        ]
        return total_norm(torch.cat(parts), self._norm_type) if parts else None

    def _measure(self, indices: Sequence[int]) -> None:
        found = [(i, g) for i in indices if (g := self._table.tensors[i].grad) is not None]
        if found:
            norms = gradient_norms([gradient for _, gradient in found], self._norm_type)
            self._taken.append(([index for index, _ in found], norms))

    @torch.no_grad()
    def _see(self, ddp: DistributedDataParallel, index: int, tensor: Tensor) -> None:
        if ddp.require_backward_grad_sync and tensor.grad is not None:
            self._arriving[index] = gradient_norms([tensor.grad], self._norm_type)[0]


def _reduced_early(ddp: DistributedDataParallel) -> list[Tensor]:
    """Lists the parameters whose gradients may be reduced before all have arrived."""
    if ddp.gradient_as_bucket_view or ddp.static_graph:
        return list(ddp.module.parameters())
    sparse = [module for module in ddp.module.modules() if getattr(module, "sparse", False)]
    return [parameter for module in sparse for parameter in module.parameters(recurse=False)]


def _reduced_at_end(ddp: DistributedDataParallel) -> list[Tensor]:
    early = {id(parameter) for parameter in _reduced_early(ddp)}
    return [parameter for parameter in ddp.module.parameters() if id(parameter) not in early]


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


class ModelHooks:
    """Tells what arrives in each backward, and measures what is gone at its end.

    Attributes:
        local: This rank's own norms; None where the model is not wrapped for data parallelism.
        added: What each backward adds to the gradients; hooks are hung by :meth:`watch_added`.
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
        self._freed = FreedGradients(table.tensors)
        self._model = model
        self._table = table
        self._arrivals = Arrivals(on_backward, None if self.local is None else on_arrived)
        self._watches_added = False
        self._held_back: HeldBack | None = None

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
            self._freed.attach(indices, norm_type)
        self.watch_also(indices)
        self._held_back = HeldBack.of(self._model, self._arrivals.begin)
        if self.local is not None:
            self.local.attach(norm_type)

    def detach(self) -> None:
        """Takes everything off; safe to call again."""
        self._arrivals.unhook()
        self._freed.detach()
        self.added.detach()
        self.unhooked = set()
        if self._held_back is not None:
            self._held_back.remove()
        if self.local is not None:
            self.local.detach()

    def watch_also(self, indices: Sequence[int]) -> list[int]:
        """Hangs marks on further parameters, as soon as they require a gradient.

        Args:
            indices: The parameters.

        Returns:
            Those that have a gradient already: they arrived before they had a mark.
        """
        self.unhooked.update(index for index in indices if not self.hooked(index))
        return self.hook_thawed()

    def watch_added(self) -> None:
        """Hangs hooks that measure what each backward adds, here and on what is watched later.

        With FSDP2 they would never be called: there a backward adds to whole gradients, which no
        parameter holds.
        """
        if not self._watches_added and self._held_back is None:
            self._watches_added = True
            self.added.watch(self._arrivals.hooked_indices())

    def take_freed(self, arrived: Sequence[int]) -> dict[int, Tensor]:
        """Returns the norms of gradients that are gone at the end of a backward, by index."""
        return self._freed.take(arrived)

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

"""The hooks on a watched model: arrivals, and gradients that must be measured before the end."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from gradwatch.hooks.backward import (
    Arrivals,
    Backward,
    FirstBackward,
    on_accumulated,
    on_incoming,
)
from gradwatch.hooks.buffers import ModelBuffers
from gradwatch.hooks.context import REPLAY, is_replaying
from gradwatch.hooks.data_parallel import fully_sharded, rank, reduced_by
from gradwatch.hooks.holding import Model, ModelReference
from gradwatch.hooks.replaced import BeforeFirstBackward, ReplacedParameters, revive_hooks
from gradwatch.measure.deferred import Deferred
from gradwatch.measure.gathering import gathered, joined, selected
from gradwatch.measure.norms import (
    NOT_KNOWN,
    Measurement,
    OwnNorm,
    combined,
    gradient_norms,
    mend_underflow_,
    total_norm,
)
from gradwatch.measure.parameters import ParameterTable

NO_PARAMETER = -1  # stands for the first arrival of a backward in which none has arrived yet


class ModelHooks:
    """Reports the gradients of each backward, and measures those that do not last until its end.

    Attributes:
        arrivals: The parameters that receive a gradient in the backward under way.
        local: This rank's norms before the reduction; None if no DistributedDataParallel is used.
        added: Norms of what each backward adds to the gradients; :meth:`watch_added` switches
            them on.
        buffers: The model's buffers, such as running statistics.
        freed: Norms of gradients that no longer exist at the end of a backward.
        unhooked: Indices of watched parameters that require no gradient yet, and so have no
            arrival hook.
        replaced: Tells whether the model has other parameters by now.
    """

    def __init__(
        self,
        model: ModelReference,
        table: ParameterTable,
        on_backward: Callable[[Backward], None],
        on_arrived: Callable[[], None],
        wrappers: Sequence[DistributedDataParallel] = (),
    ) -> None:
        """Registers no hook yet.

        ``on_backward`` is called at the end of each backward, when every ``.grad`` is final.
        ``on_arrived`` is called before it, when DistributedDataParallel has not yet written reduced
        gradients back; it is used only if :attr:`local` is not None. Neither may hold the
        parameters. ``wrappers`` are those that reduce the model's gradients.
        """
        self.unhooked: set[int] = set()
        self.local = LocalNorms(wrappers, table) if wrappers else None
        self.added = MicroBatchNorms(table.tensors)
        self.freed = FreedGradients(table.tensors)
        self.buffers = ModelBuffers(model)
        self.replaced = ReplacedParameters(model, table)
        self._model = model
        self._table = table
        self.arrivals = Arrivals(on_backward, None if self.local is None else on_arrived)
        self._on_arrived = on_arrived
        self._norm_type = 2.0
        self._watches_added = False
        self._output_hook: RemovableHandle | None = None
        self.before_first: BeforeFirstBackward | None = None

    def hooked(self, index: int) -> bool:
        """Returns whether a parameter has an arrival hook."""
        return self.arrivals.hooked(index)

    def attach(self, indices: Sequence[int], norm_type: float, owned: bool) -> None:
        """Registers the hooks.

        Args:
            indices: Indices of the parameters to watch.
            norm_type: The p of the norms.
            owned: Whether the optimizers were named. If not, one may turn up that steps inside the
                backward, so gradients that are freed there are measured.
        """
        self._norm_type = norm_type
        if not owned:
            # Before the arrival hooks, so that any hook found on a parameter is not ours.
            self.freed.attach(indices, norm_type)
        self.watch_also(indices)
        model = self._model()
        if _holds_gradients_back(model):
            self._output_hook = model.register_forward_hook(self._hook_output)
        if self.local is not None:
            self.local.attach(norm_type)

    def measure_local(self, wrappers: Sequence[DistributedDataParallel]) -> None:
        """Measures this rank's own gradients from now on, as the model was wrapped only lately."""
        self.local = LocalNorms(wrappers, self._table)
        self.local.attach(self._norm_type)
        self.arrivals.call_when_arrived(self._on_arrived)

    def own_norm(self, measurement: Measurement) -> OwnNorm:
        """Returns the norm of this rank's own gradients in the backward that has just ended.

        Args:
            measurement: The gradients at its end, which the ranks may have reduced by then.
        """
        local = self.local
        own = None if local is None else local.total(measurement.indices)
        if local is not None and own is not None:
            return OwnNorm(Deferred(own), local.indices, rank())
        if local is not None and local.were_reduced():
            return NOT_KNOWN
        # No wrapper has reduced them. A hook may have.
        return OwnNorm(measurement.total, Unhooked(self._table.tensors), rank())

    def arriving(self) -> list[int]:
        """Lists the parameters that have received a gradient in the backward that is running."""
        return list(self.arrivals)

    def detach(self) -> None:
        """Removes every hook; safe to call again."""
        self.arrivals.unhook()
        self.freed.detach()
        self.added.detach()
        self.buffers.detach()
        self.unhooked = set()
        self.end_before_first_backward()
        if self._output_hook is not None:
            self._output_hook.remove()
            self._output_hook = None
        if self.local is not None:
            self.local.detach()

    def let_go(self) -> None:
        """Drops everything of the model and its gradients, after :meth:`detach`."""
        self.buffers.let_go()
        if self.local is not None:
            self.local.let_go()

    def watch_also(self, indices: Sequence[int]) -> list[int]:
        """Watches further parameters; one is hooked as soon as it requires a gradient.

        Returns:
            Those that were hooked and already have a gradient: it arrived without being noticed.
        """
        self.unhooked.update(index for index in indices if not self.hooked(index))
        return self.hook_thawed()

    def hook_thawed(self) -> list[int]:
        """Hooks the parameters that require a gradient by now (frozen layers that were thawed).

        Returns:
            Those that were hooked and already have a gradient.
        """
        tensors = self._table.tensors
        thawed = sorted(index for index in self.unhooked if tensors[index].requires_grad)
        for index in thawed:
            self.arrivals.hook(index, tensors[index])
        if self._watches_added:
            self.added.watch(thawed)
        self.unhooked = self.unhooked.difference(thawed)  # anew, as a set never gives back memory
        return [index for index in thawed if tensors[index].grad is not None]

    def before_first_backward(self, call: Callable[[], object]) -> None:
        """Has a function called before each forward, until a backward has ended."""
        self.before_first = BeforeFirstBackward(self._model.module(), call)

    def end_before_first_backward(self) -> None:
        """Ends :meth:`before_first_backward`; safe to call again."""
        if self.before_first is not None:
            self.before_first.remove()
            self.before_first = None

    def exchange(self, replaced: Mapping[int, Tensor]) -> list[int]:
        """Watches other tensors in place of some; see :class:`ReplacedParameters`.

        Args:
            replaced: The new tensors by index; the same tensor where it has lost its hooks.

        Returns:
            The indices of those that cannot be watched, as hooks of others on them are dead.
        """
        parts = [one for one in (self.freed, self.added, self.local) if one is not None]
        dead = []
        for index, tensor in replaced.items():
            hooked = self.arrivals.unhook_one(index)
            again = [one for one in parts if one.unhook_one(index)]
            swapped = tensor is self._table.tensors[index]
            self._table.tensors[index] = tensor
            if swapped and not revive_hooks(tensor):
                dead.append(index)
                continue
            if hooked:
                self.unhooked.add(index)
            for one in again:
                one.hook_again(index)
        self.hook_thawed()
        return dead

    def changed_parameters(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Compares the model with the watched parameters.

        Returns:
            Names of parameters that the model has now and that are not watched, and of those that
            are watched and that it no longer has. Both are empty for a model that is gone, and for
            one that is sharded over ranks, which replaces its parameters in every forward.
        """
        model = self._model()
        # Loose tensors have no model to be gone, but they are let go with their last optimizer.
        if model is None or self._table.is_gone or next(fully_sharded(model), None):
            return (), ()
        now, known = ParameterTable.of(model), self._table
        then, there = known.positions(), now.positions()
        gained = [
            name
            for name, tensor in zip(now.names, now.tensors, strict=True)
            if tensor.requires_grad and id(tensor) not in then
        ]
        lost = [
            name
            for name, tensor in zip(known.names, known.tensors, strict=True)
            if id(tensor) not in there
        ]
        return tuple(gained), tuple(lost)

    def watch_added(self) -> None:
        """Measures what each backward adds to the gradients, of later watched parameters too."""
        # With FSDP2 the hooks would never be called: its backward adds to unsharded gradients,
        # which are not in the .grad of any watched parameter.
        if not self._watches_added and self._output_hook is None:
            self._watches_added = True
            self.added.watch(self.arrivals.hooked_indices())

    def _hook_output(self, module: nn.Module, args: Any, output: Any) -> None:
        if REPLAY.under_way and is_replaying():
            return
        hook = partial(_begin_backward, weakref.ref(self))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                on_incoming(leaf, hook)


def _begin_backward(reference: weakref.ref[ModelHooks], gradient: Tensor) -> None:
    hooks = reference()
    # Removing the hook from the model does not remove it from graphs built before.
    if hooks is not None and hooks._output_hook is not None:
        if not hooks.arrivals.under_way:
            hooks.arrivals.on_begin(NO_PARAMETER)
        hooks.arrivals.begin()


def _holds_gradients_back(model: Model | None) -> TypeGuard[nn.Module]:
    """Returns whether a backward of the model may run without any parameter hook being called.

    Such a backward is noticed by a hook on the model's outputs instead.
    """
    # FSDP2 calls no parameter hook in a micro-batch that does not communicate.
    if not isinstance(model, nn.Module) or next(fully_sharded(model), None) is None:
        return False
    # In a compiled model the output hook would be traced, and break the graph.
    return model._compiled_call_impl is None


class _TensorHooks:
    """Holds at most one hook on each tensor of the parameter table."""

    _see: ClassVar[Callable[..., None]]
    """Called with a weak reference to this object, the index of a tensor, and what torch gives."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._norm_type = 2.0
        self._handles: dict[int, RemovableHandle] = {}

    def _hook(
        self,
        indices: Iterable[int],
        register: Callable[[Tensor, Callable[[Tensor], None]], RemovableHandle] = on_incoming,
    ) -> None:
        """Registers :attr:`_see` on the tensors that require a gradient, once on each."""
        this = weakref.ref(self)
        for index in indices:
            tensor = self._tensors[index]
            if index not in self._handles and tensor.requires_grad:
                self._handles[index] = register(tensor, partial(self._see, this, index))

    def unhook_one(self, index: int) -> bool:
        """Removes the hook on a tensor; returns whether there was one."""
        handle = self._handles.pop(index, None)
        if handle is not None:
            handle.remove()
        return handle is not None

    def hook_again(self, index: int) -> None:
        """Hooks a tensor that is in the place of one that was hooked."""
        self._hook([index])

    def detach(self) -> None:
        """Removes the hooks; safe to call again."""
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}


class Unhooked:
    """The indices of the tensors on which nobody but gradwatch has a hook."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Looks at no tensor yet."""
        self._tensors = tensors

    def __contains__(self, index: object) -> bool:
        """Returns whether a tensor has no hook that could have communicated in a backward."""
        if not self._tensors:  # let go, so nothing tells any more
            return False
        tensor: Any = self._tensors[index] if isinstance(index, int) else None
        # Private, as torch has no public way to list hooks (torch 2.4 to 2.13).
        kinds = ("_backward_hooks", "_post_accumulate_grad_hooks")
        hooks = [one for kind in kinds for one in (getattr(tensor, kind, None) or {}).values()]
        return all(map(_is_ours, hooks))


def _is_ours(hook: object) -> bool:
    if not isinstance(hook, partial):
        return isinstance(getattr(hook, "__self__", None), FirstBackward)
    of_here = getattr(hook.func, "__module__", "") == __name__
    return of_here or isinstance(next(iter(hook.args), None), Arrivals)


Parts = list[tuple[list[int], Tensor]]


def _total(parts: Parts, indices: Sequence[int], norm_type: float) -> Tensor | None:
    """Combines the norms of some tensors that were measured in parts; None if there is no part."""
    wanted = set(indices)
    norms = [
        norms if wanted.issuperset(there) else selected(norms, _entries(there, wanted))
        for there, norms in parts
    ]
    return total_norm(joined(norms), norm_type) if norms else None


def _entries(there: Sequence[int], wanted: Container[int]) -> list[int]:
    return [entry for entry, index in enumerate(there) if index in wanted]


class FreedGradients(_TensorHooks):
    """Measures gradients that an optimizer uses and frees inside the backward.

    Each is measured before it is added to ``.grad``. As no gradient is left from an earlier
    backward, what is added is the whole gradient.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Watches nothing yet."""
        super().__init__(tensors)
        self._norms: dict[int, Tensor] = {}

    def attach(self, indices: Iterable[int], norm_type: float) -> None:
        """Measures the parameters that already have a post-accumulate hook of the user.

        It must be called before gradwatch registers hooks of its own on the watched parameters.
        """
        self._norm_type = norm_type
        # An optimizer that steps inside the backward does so in such a hook. The attribute is
        # private, as torch has no public way to list hooks (torch 2.4 to 2.13). Without it the
        # first step would be missed: take() notices only afterwards that a gradient is gone.
        hooked = [i for i in indices if getattr(self._tensors[i], "_post_accumulate_grad_hooks", 0)]
        self._hook(hooked)

    def take(self, arrived: Sequence[int]) -> dict[int, Tensor]:
        """Returns the norms of the gradients that were freed by the end of a backward.

        ``arrived`` are the indices of the parameters that received a gradient in it.

        Returns:
            Tensors ``[]`` by index. A gradient that was not expected to be freed is missing; it is
            measured from the next backward on.
        """
        norms, self._norms = self._norms, {}
        gone = [index for index in arrived if self._tensors[index].grad is None]
        self._hook(gone)
        return {index: norms[index] for index in gone if index in norms}

    @staticmethod
    @torch.no_grad()
    def _see(reference: weakref.ref[FreedGradients], index: int, gradient: Tensor) -> None:
        self = reference()
        if self is None:
            return
        norms = Deferred(gradient_norms([gradient], self._norm_type))
        mend_underflow_(norms, [gradient], self._norm_type)
        self._norms[index] = norms.tensor[0]


def with_freed(
    measurement: Measurement, freed: Mapping[int, Tensor], norm_type: float
) -> Measurement:
    """Adds the norms ``[]`` of freed gradients, by index, to a measurement of the others.

    Returns:
        The measurement that one pass over all these gradients would have given.
    """
    norms = dict(zip(measurement.indices, measurement.norms.tensor.unbind(), strict=True))
    norms.update(freed)
    indices = sorted(norms)
    row = Deferred(gathered([norms[index] for index in indices]))
    return Measurement(indices, row, combined(row, norm_type))


class LocalNorms(_TensorHooks):
    """Measures this rank's own gradients just before they are reduced over ranks.

    It does not communicate.

    Attributes:
        indices: The parameters whose gradients the wrappers reduce.
    """

    def __init__(self, wrappers: Sequence[DistributedDataParallel], table: ParameterTable) -> None:
        """Sorts the parameters of the wrappers by when their gradients are reduced."""
        super().__init__(table.tensors)
        # Normally DDP reduces copies (its buckets) and writes the result into .grad at the end of
        # the backward, so until then one batched pass sees all local gradients. Those that are
        # reduced early must be measured one by one as they arrive.
        self._at_end: list[tuple[weakref.ref[DistributedDataParallel], list[int]]] = []
        self._early: dict[int, list[weakref.ref[DistributedDataParallel]]] = {}
        taken: set[int] = set()
        self.indices: set[int] = set()
        self._total: tuple[Sequence[int], Tensor | None] | None = None
        for ddp in wrappers:
            self.indices.update(table.indices_of(reduced_by(ddp)))
            early = table.indices_of(_reduced_early(ddp))
            rest = set(table.indices_of(ddp.module.parameters())).difference(early)
            # An unused wrapper of the same parameters may still be in memory.
            self._at_end.append((weakref.ref(ddp), sorted(rest - taken)))
            taken |= rest
            for index in early:
                self._early.setdefault(index, []).append(weakref.ref(ddp))
        self._parts: Parts = []
        self._unsettled: list[tuple[tuple[list[int], Tensor], list[Tensor], list[int]]] = []
        self._held: list[tuple[list[Tensor], list[int]]] = []
        self._arriving: dict[int, Tensor] = {}

    def attach(self, norm_type: float) -> None:
        """Registers hooks on the parameters whose gradients must be measured as they arrive."""
        self._norm_type = norm_type
        self._hook(self._early, on_accumulated)

    def hook_again(self, index: int) -> None:
        """Hooks a tensor that is in the place of one that was hooked."""
        self._hook([index], on_accumulated)

    def take(self) -> None:
        """Measures at the end of a backward, before DDP writes reduced gradients back."""
        arrived, self._arriving = self._arriving, {}
        self._total = None
        self._parts = [(list(arrived), gathered(list(arrived.values())))] if arrived else []
        self._unsettled, self._held = [], []
        for reference, indices in self._at_end:
            ddp = reference()
            if ddp is None:
                continue
            found = [(i, g) for i in indices if (g := self._tensors[i].grad) is not None]
            some = [grad for _, grad in found[:: len(found) // _SEEN_GRADIENTS + 1]]
            # Under no_sync() nothing is reduced, and later the gradients are sums of several
            # micro-batches.
            if found and ddp.require_backward_grad_sync:
                norms = gradient_norms([gradient for _, gradient in found], self._norm_type)
                part = ([index for index, _ in found], norms)
                self._parts.append(part)
                # DDP leaves the gradient of a parameter alone that no rank has used.
                if not ddp.find_unused_parameters:
                    self._unsettled.append((part, some, _versions(some)))
            else:
                self._held.append((some, _versions(some)))

    def total(self, indices: Sequence[int]) -> Tensor | None:
        """Returns this rank's norm of some gradients before the newest reduction.

        Returns:
            Tensor ``[]``, in the unit of the gradients; None if nothing was reduced.
        """
        if self._unsettled:
            self._drop_what_was_not_reduced()
        if self._total is None or self._total[0] is not indices:
            self._total = (indices, _total(self._parts, indices, self._norm_type))
        return self._total[1]

    def let_go(self) -> None:
        """Drops the gradients that are held; what is known of them stays."""
        if self._unsettled:
            self._drop_what_was_not_reduced()
        self._held = []

    def were_reduced(self) -> bool:
        """Returns whether gradients were reduced that a wrapper was told to hold back.

        It obeys the ``no_sync()`` of the forward, and tells only that of the backward. To be called
        at the end of the backward.
        """
        return any(_versions(some) != before for some, before in self._held)

    def _drop_what_was_not_reduced(self) -> None:
        """Drops norms of gradients that nobody has written to, as the wrapper was not called."""
        # To be called at the end of the backward, before any code of the user runs. A loss that the
        # wrapper has not computed is not reduced, and .grad may be a sum with reduced gradients.
        unreduced = [part for part, some, before in self._unsettled if _versions(some) == before]
        self._parts = [one for one in self._parts if not any(one is part for part in unreduced)]
        self._unsettled = []

    @staticmethod
    @torch.no_grad()
    def _see(reference: weakref.ref[LocalNorms], index: int, tensor: Tensor) -> None:
        self = reference()
        if self is None:
            return
        there = (ddp for one in self._early[index] if (ddp := one()) is not None)
        reduces = any(ddp.require_backward_grad_sync for ddp in there)
        if reduces and tensor.grad is not None:
            self._arriving[index] = gradient_norms([tensor.grad], self._norm_type)[0]


_SEEN_GRADIENTS = 16


def _versions(tensors: Iterable[Tensor]) -> list[int]:
    return [tensor._version for tensor in tensors]


def _reduced_early(ddp: DistributedDataParallel) -> list[Tensor]:
    """Lists the parameters whose gradients DDP may reduce before all of them have arrived."""
    # A gradient that is a view of its bucket is reduced in place, as soon as the bucket is full.
    # With static_graph=True the first reduction runs before our end-of-backward callback.
    if ddp.gradient_as_bucket_view or ddp.static_graph:
        return list(ddp.module.parameters())
    # A sparse gradient is not copied to a bucket.
    sparse = [module for module in ddp.module.modules() if getattr(module, "sparse", False)]
    return [parameter for module in sparse for parameter in module.parameters(recurse=False)]


_HELD_BYTES = 2**20  # small enough to be still in the cache, and to be freed soon


class MicroBatchNorms(_TensorHooks):
    """Measures what a backward adds to each gradient, before it is added.

    A tensor hook sees what a backward adds. Measuring it in the hook would take one small call per
    parameter, so the gradients are kept until there is a megabyte of them, or the backward ends,
    and are then measured in one batched call.

    Attributes:
        active: Whether to keep gradients in the next backward.
        watching: Whether hooks are registered.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Watches nothing yet."""
        super().__init__(tensors)
        # Autograd moves an incoming gradient into an empty .grad without a copy, unless somebody
        # else holds a reference to it. So nothing is kept in the first micro-batch (active is
        # False): .grad itself is then what that micro-batch added.
        self.active = False
        self.watching = False
        self._bytes = [tensor.numel() * tensor.element_size() for tensor in tensors]
        self._task = -1
        self.begin()

    def watch(self, indices: Iterable[int]) -> None:
        """Registers hooks on those tensors that require a gradient, once on each."""
        self.watching = True
        self._hook(indices)

    def hook_again(self, index: int) -> None:
        """Hooks a tensor that is in the place of one that was hooked."""
        tensor = self._tensors[index]
        self._bytes[index] = tensor.numel() * tensor.element_size()
        super().hook_again(index)

    def detach(self) -> None:
        """Removes the hooks; safe to call again."""
        super().detach()
        self.watching = False
        self.begin()

    def begin(self) -> None:
        """Drops gradients and norms that are left from an earlier backward."""
        self._held: dict[int, Tensor] = {}
        self._held_bytes = 0
        self._parts: Parts = []

    def total(self, indices: Sequence[int]) -> Tensor | None:
        """Returns the norm of what the backward that has just ended added to some gradients.

        Returns:
            Tensor ``[]``, in the unit of the gradients; None if no gradient was kept.
        """
        self._measure()
        return _total(self._parts, indices, self._norm_type)

    @staticmethod
    def _see(reference: weakref.ref[MicroBatchNorms], index: int, gradient: Tensor) -> None:
        self = reference()
        if self is None or not self.active:
            return
        # The number of the backward, which is private. A new number means that gradients which are
        # still held are left over from a backward that failed.
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

"""Ranks that average gradients: which they are, when they communicate, and how to defer it.

What FSDP2 and DistributedDataParallel keep to themselves is named in this file only. The names of
DistributedDataParallel were seen on torch 2.4 to 2.13, those of FSDP2 on 2.9 to 2.13.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from gradwatch.measure.parameters import is_sharded, local_part

FSDP1 = (
    "watch(model=) got a model with FullyShardedDataParallel in it (FSDP1), whose flattened "
    "parameters show each rank another part of the gradients: norms would be wrong, and each rank "
    "would clip by its own. Shard the model with torch.distributed.fsdp.fully_shard() instead, or "
    "with ShardingStrategy.NO_SHARD or DistributedDataParallel if it fits on one device."
)
DIFFERENT_RANKS = (
    "The model's gradients are averaged over different ranks: some over {first}, others over "
    "{second}, and neither contains the other. What the micro-batches of all ranks weigh together "
    "has no one answer then. Use one process group, or one mesh, for all wrappers of the model."
)
CANNOT_DEFER = (
    "A window ended early, after a backward that did not communicate, and its gradients cannot be "
    "reduced afterwards: {why}. Say beforehand where a window ends: iterate over "
    "watcher.micro_batches(...), or give the exact size of every window."
)
NO_SUCH_API = "torch {version} does it in another way than gradwatch knows ({error})"
STILL_KEPT = "torch {version} still keeps some of them"
SPARSE_HOOK = "a communication hook is registered, and some of them are sparse"


# -- which ranks -----------------------------------------------------------------------------------


def is_distributed() -> bool:
    """Tells whether a process group is set up."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Returns the rank of this process; 0 where there is no process group."""
    return dist.get_rank() if is_distributed() else 0


@dataclass(frozen=True, slots=True, eq=False)
class DataParallel:
    """The ranks among which a model's gradients are averaged: each of them sees other data.

    Attributes:
        ranks: How many they are; at least 2.
        wrappers: The wrappers that do it for the model; empty where FSDP2 does.
        groups: Process groups to reduce over, one after the other; nearly always one. None is the
            whole world.
    """

    ranks: int
    wrappers: list[DistributedDataParallel]
    groups: list[Any]

    @classmethod
    def of(cls, model: object) -> DataParallel | None:
        """Finds out who averages a model's gradients.

        Under tensor parallelism the ranks that share one copy of the data count once. Where some
        parameters are averaged over fewer ranks than others, as experts may be, the most count.

        Returns:
            The ranks; None where there is no data parallelism, or only one rank of it.

        Raises:
            ValueError: If gradients are averaged over ranks of which none contain all others.
        """
        wrappers = wrappers_of(model)
        # Who averages some of the parameters, and the process groups that reach all of them.
        found: list[tuple[frozenset[int], list[Any]]] = [
            (frozenset(dist.get_process_group_ranks(w.process_group)), [w.process_group])
            for w in wrappers
        ]
        for module in fully_sharded(model):
            # Not the mesh of a parameter, which has more dimensions under tensor parallelism.
            found += [_ranks_of(group.mesh_info.mesh) for group in _parameter_groups(module)]
        widest, groups = max(found, key=lambda one: len(one[0]), default=(frozenset(), []))
        if len(widest) < 2:
            return None
        for ranks, _ in found:
            if not ranks <= widest:
                first, second = sorted(widest), sorted(ranks)
                raise ValueError(DIFFERENT_RANKS.format(first=first, second=second))
        return cls(ranks=len(widest), wrappers=wrappers, groups=groups)

    def sum_(self, numbers: Tensor) -> Tensor:
        """Sums numbers over the ranks, in place: a tensor on the model's device, and returns it."""
        for group in self.groups:
            dist.all_reduce(numbers, group=group)
        return numbers

    def max_(self, numbers: Tensor) -> Tensor:
        """Replaces each number by the largest of all ranks, as :meth:`sum_` does by the sum."""
        for group in self.groups:
            dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=group)
        return numbers


def _ranks_of(mesh: Any) -> tuple[frozenset[int], list[Any]]:
    ranks = frozenset(mesh.mesh.flatten().tolist())
    # A mesh has a process group per dimension; the world does several of them in one go.
    whole_world = mesh.ndim > 1 and len(ranks) == dist.get_world_size()
    return ranks, [None] if whole_world else [mesh.get_group(d) for d in range(mesh.ndim)]


# -- DistributedDataParallel -----------------------------------------------------------------------


def wrappers_of(model: object) -> list[DistributedDataParallel]:
    """Lists the wrappers that reduce a model's gradients.

    They are the model or are in it, or else have it in them: a loop may call the wrapper and have
    the bare module watched.
    """
    if not isinstance(model, nn.Module):
        return []
    inside = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    return inside if inside or not is_distributed() else list(_around(model))


def _around(model: nn.Module) -> Iterator[DistributedDataParallel]:
    """Finds the wrappers of the process that have a model in them."""
    for wrapper in all_wrappers():
        # One whose constructor failed has no module, and lives on in the traceback.
        wrapped = getattr(wrapper, "module", None)
        if wrapped is not None and any(part is model for part in wrapped.modules()):
            yield wrapper


def all_wrappers() -> list[DistributedDataParallel]:
    """Lists the wrappers of the process."""
    # torch keeps no list of them. The class of an object, not isinstance(): that asks proxies,
    # which may answer with an error.
    return [one for one in gc.get_objects() if issubclass(type(one), DistributedDataParallel)]


def can_hold(wrapper: DistributedDataParallel) -> bool:
    """Tells whether a wrapper's next micro-batch may be held back."""
    # With static_graph=True torch fails in the first backward of all unless it communicates
    # (pytorch#143580). The first backward sets this flag, whatever its name says.
    begun: bool = getattr(wrapper, "_static_graph_delay_allreduce_enqueued", False)
    return begun or not wrapper.static_graph


def broadcast_buffers(wrappers: Iterable[DistributedDataParallel]) -> None:
    """Broadcasts buffers where the next forwards would, which then do not: all ranks must call it.

    A rank whose forward fails, or that fails before it, leaves the others waiting in it.

    Args:
        wrappers: The same on every rank, in the same order.
    """
    each: Iterable[Any] = wrappers  # torch leaves these methods without annotations
    for wrapper in each:
        if wrapper._check_sync_bufs_pre_fwd():
            wrapper._sync_buffers()
        # As after a forward that was held back. To reduce what was held back sets it again.
        wrapper.require_forward_param_sync = False


# -- FSDP ------------------------------------------------------------------------------------------


def fully_sharded(model: object) -> Iterator[nn.Module]:
    """Lists the modules of a model that ``fully_shard`` (FSDP2) was applied to."""
    return _modules_of_kind(model, "FSDPModule")


def refuse_fsdp1(model: object) -> None:
    """Refuses a model whose gradients no rank can see rightly.

    Raises:
        ValueError: If it holds a ``FullyShardedDataParallel`` that shards anything.
    """
    for module in _modules_of_kind(model, "FullyShardedDataParallel"):
        strategy: Any = getattr(module, "sharding_strategy", None)
        if getattr(strategy, "name", "") != "NO_SHARD":
            raise ValueError(FSDP1)


def _modules_of_kind(model: object, name: str) -> Iterator[nn.Module]:
    # Importing the package takes long, and where nobody has there is no such module. Before
    # torch 2.6 it has no FSDPModule.
    kind: Any = getattr(sys.modules.get("torch.distributed.fsdp"), name, None)
    modules = model.modules() if isinstance(model, nn.Module) and kind is not None else ()
    return (module for module in modules if isinstance(module, kind))


def reshard(model: object) -> None:
    """Has FSDP2 put its shards back in place of whole parameters.

    After a forward without a backward, the outermost module still holds the whole parameters,
    which are other tensors than those that the optimizer has. The next forward gathers them anew.
    """
    sharded: Iterator[Any] = fully_sharded(model)
    for module in sharded:
        if not all(map(is_sharded, module.parameters())):
            module.reshard()


def _parameter_groups(module: Any) -> list[Any]:
    """Lists what FSDP2 communicates at once; none where all parameters are of inner modules."""
    # Only torch's private records know the mesh that gradients are averaged over, and the flags
    # that the user has set.
    state = module._get_fsdp_state()
    # Older versions of torch have one group at most, under the singular name.
    if not hasattr(state, "_fsdp_param_groups"):
        return [group for group in [state._fsdp_param_group] if group is not None]
    return list(state._fsdp_param_groups)


# -- holding back, and reducing afterwards ---------------------------------------------------------


class GradientSync:
    """Keeps all but the last micro-batch of a window from communicating.

    The flags are read by a micro-batch's forward and by its backward: set them before both.

    Attributes:
        is_held: Whether anything is held back in the next micro-batch.
    """

    def __init__(self, parts: Sequence[_Wrapped | _Sharded]) -> None:
        """Starts with the flags as they are.

        Args:
            parts: What communicates.
        """
        self._parts = parts
        self._handles: list[RemovableHandle] = []
        self.is_held = False

    @classmethod
    def of(cls, model: object, data_parallel: DataParallel | None) -> GradientSync | None:
        """Makes one for a model; None where nothing communicates.

        Args:
            model: What is watched.
            data_parallel: The ranks that average its gradients; None where they are not known.
        """
        wrappers = wrappers_of(model) if data_parallel is None else data_parallel.wrappers
        sharded = list(fully_sharded(model))
        parts: list[_Wrapped | _Sharded] = [_Wrapped(wrappers)] if wrappers else []
        if sharded:
            parts.append(_Sharded(sharded))
        return cls(parts) if parts else None

    @property
    def modules(self) -> list[nn.Module]:
        """The modules whose forward begins a micro-batch."""
        return [module for part in self._parts for module in part.modules]

    def before_forwards(self, model: object, hook: Callable[[nn.Module, Any], None]) -> None:
        """Hangs a hook on what communicates, to know when a micro-batch begins.

        Args:
            model: What is watched.
            hook: Called before each forward, with the module and its arguments.
        """
        modules = self.modules
        # Inside of what torch.compile() has made, the hook would be compiled too.
        if modules and isinstance(model, nn.Module) and hasattr(model, "_orig_mod"):
            modules = [model]
        for module in modules:
            if module._compiled_call_impl is None:
                self._handles.append(module.register_forward_pre_hook(hook))

    def detach(self) -> None:
        """Removes the hooks, and puts the flags back as the user had set them."""
        self.restore()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def hold_back(self) -> None:
        """Has the next forwards and backwards not communicate gradients, where that is possible."""
        held = [part.hold_back() for part in self._parts]  # any() alone stops at the first
        self.is_held = any(held)

    def restore(self) -> None:
        """Puts the flags back as the user had set them; safe to call again."""
        self.is_held = False
        for part in self._parts:
            part.restore()

    @torch.no_grad()
    def reduce_(self) -> None:
        """Averages the gradients that were held back, after their last backward.

        All ranks must call it. Gradients become what they are after a window that communicated, to
        rounding. It changes no flag; to average again what has been averaged changes nothing.

        Raises:
            RuntimeError: If this version of torch has no way to do that.
        """
        try:
            for part in self._parts:
                part.reduce_()
        except AttributeError as error:  # much of it is torch's private business
            why = NO_SUCH_API.format(version=torch.__version__, error=error)
            raise RuntimeError(CANNOT_DEFER.format(why=why)) from error


class _Wrapped:
    """Wrappers, which leave the local sum in the gradients of a micro-batch that is held back."""

    def __init__(self, wrappers: Sequence[DistributedDataParallel]) -> None:
        self.modules: Sequence[nn.Module] = wrappers
        self._wrappers = wrappers
        self._before: list[bool] | None = None
        self._held: list[DistributedDataParallel] = []

    def hold_back(self) -> bool:
        """Sets the flags; returns whether anything is held back now."""
        # The flag that no_sync() sets. A context manager would have to be open across calls of the
        # user's code, and one that is never closed would leave it set.
        if self._before is None:
            self._before = [wrapper.require_backward_grad_sync for wrapper in self._wrappers]
        held = [wrapper for wrapper in self._wrappers if can_hold(wrapper)]
        for wrapper in self._wrappers:
            wrapper.require_backward_grad_sync = wrapper not in held
        # Not forgotten by restore(): the backward that it waits for may never come.
        self._held = held or self._held
        return bool(held)

    def restore(self) -> None:
        for wrapper, before in zip(self._wrappers, self._before or [], strict=False):
            wrapper.require_backward_grad_sync = before
        self._before = None

    def reduce_(self) -> None:
        done: set[int] = set()
        for wrapper in self._held:
            # A wrapper that nobody uses any more may still be around, on some ranks only.
            parameters = [p for p in _reduced_by(wrapper) if id(p) not in done]
            done.update(map(id, parameters))
            if parameters and dist.get_world_size(wrapper.process_group) > 1:
                _average_(wrapper, parameters)
            # As after a backward that communicated: the next forward broadcasts the buffers.
            wrapper.require_forward_param_sync = True


class _Sharded:
    """Modules under FSDP2, which keeps the gradients of what is held back out of sight."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        # A micro-batch begins with the forward of the outermost module.
        self.modules: Sequence[nn.Module] = modules[:1]
        self._modules: Sequence[Any] = modules
        self._before: list[tuple[Any, bool, bool]] = []

    def hold_back(self) -> bool:
        """Sets the flags; returns whether anything is held back now."""
        self._before = self._before or self._flags()
        for module in self._modules:
            module.set_requires_gradient_sync(False, recurse=False)
        return True

    def restore(self) -> None:
        _set_flags(self._before)
        self._before = []

    def reduce_(self) -> None:
        before = self._flags()
        try:
            _set_flags([(group, True, True) for group, _, _ in before])
            self._reduce_()
        finally:
            _set_flags(before)

    def _reduce_(self) -> None:
        """Runs what FSDP2 runs in a backward that communicates, without a backward."""
        # No public call reduces what set_requires_gradient_sync(False) has kept; a backward of
        # zeros would do it, but needs a loss and the graph of every module.
        states = [module._get_fsdp_state() for module in self._modules]
        # The last module first, as in a backward: ranks must send in the same order.
        for module, state in zip(reversed(self._modules), reversed(states), strict=True):
            # None until the first forward, before which there is nothing to reduce.
            if state._is_root is not None:
                for group in reversed(_parameter_groups(module)):
                    group.post_backward()
        for state in states:
            if state._is_root:
                _finish_backward(state)
        # Where a newer torch has other conditions, nothing fails but the gradients are not there.
        if any(_keeps_gradients(group) for group, _, _ in self._flags()):
            why = STILL_KEPT.format(version=torch.__version__)
            raise RuntimeError(CANNOT_DEFER.format(why=why))

    def _flags(self) -> list[tuple[Any, bool, bool]]:
        # What the public setters set per module; there are no getters.
        groups = [group for module in self._modules for group in _parameter_groups(module)]
        return [(group, group.reduce_grads, group.all_reduce_grads) for group in groups]


def _set_flags(flags: Sequence[tuple[Any, bool, bool]]) -> None:
    for group, reduce, all_reduce in flags:
        group.reduce_grads, group.all_reduce_grads = reduce, all_reduce


def _finish_backward(root: Any) -> None:
    """Has FSDP2 do what it does at the end of a backward that communicated."""
    context = root._state_ctx
    # Else it does not wait for the reductions. The user may have set it so.
    before, context.is_last_backward = context.is_last_backward, True
    try:
        root._root_post_backward_final_callback()
    finally:
        context.is_last_backward = before


def _keeps_gradients(group: Any) -> bool:
    for parameter in group.fsdp_params:
        whole = getattr(parameter, "_unsharded_param", None)
        if parameter.unsharded_accumulated_grad is not None:
            return True
        if whole is not None and whole.grad is not None:
            return True
    return False


def _reduced_by(wrapper: DistributedDataParallel) -> list[Tensor]:
    ignored = wrapper.parameters_to_ignore
    named = wrapper.module.named_parameters()
    return [p for name, p in named if p.requires_grad and name not in ignored]


def _average_(wrapper: DistributedDataParallel, parameters: Sequence[Tensor]) -> None:
    group, hooked = wrapper.process_group, bool(getattr(wrapper, "_comm_hooks", ()))
    dense, sparse = _align_gradients_(parameters, group)
    if hooked and sparse:
        raise RuntimeError(CANNOT_DEFER.format(why=SPARSE_HOOK))
    if hooked:
        _run_hook_(wrapper.reducer)
    else:
        _average_gradients_(dense, sparse, group)


def _run_hook_(reducer: Any) -> None:
    """Has a wrapper's own communication hook reduce its gradients: it may not be a mean at all."""
    # A hook takes a GradBucket, which only the reducer can make.
    for bucket in reducer._get_zeros_like_grad_buckets():
        _copy_(bucket.gradients(), [p.grad for p in bucket.parameters()])
        reduced = reducer._run_comm_hook(bucket).wait()
        # A list of one tensor from some futures, the tensor itself from others.
        bucket.set_buffer(reduced if isinstance(reduced, Tensor) else reduced[0])
        _copy_([p.grad for p in bucket.parameters()], bucket.gradients())


def _copy_(targets: Sequence[Tensor | None], sources: Sequence[Tensor | None]) -> None:
    for target, source in zip(targets, sources, strict=True):
        if target is not None and source is not None:
            target.copy_(source)


_BUCKET_BYTES = 25 * 2**20  # as a wrapper has by default
_NONE, _DENSE, _SPARSE = 0, 1, 2


def _align_gradients_(
    parameters: Sequence[Tensor], group: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Gives a parameter that has a dense gradient on another rank one of zeros here.

    Args:
        parameters: The same on every rank, in the same order.
        group: The process group.

    Returns:
        The parameters with a dense gradient and those with a sparse one; the others have none on
        any rank.
    """
    # A collective in which ranks send different numbers of elements hangs or mixes them up, so
    # that they must agree first; tolist() waits for the device, once.
    local = [
        _NONE if p.grad is None else _SPARSE if p.grad.is_sparse else _DENSE for p in parameters
    ]
    layouts = torch.tensor(local, dtype=torch.uint8, device=parameters[0].device)
    dist.all_reduce(layouts, op=dist.ReduceOp.MAX, group=group)
    found: dict[int, list[Tensor]] = {_NONE: [], _DENSE: [], _SPARSE: []}
    for parameter, layout in zip(parameters, layouts.tolist(), strict=True):
        found[layout].append(parameter)
        if layout == _DENSE and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return found[_DENSE], found[_SPARSE]


def _average_gradients_(dense: Sequence[Tensor], sparse: Sequence[Tensor], group: Any) -> None:
    """Averages gradients over ranks, in place, as a wrapper would at the end of a backward."""
    ranks = dist.get_world_size(group)
    for bucket in _buckets([local_part(p.grad) for p in dense if p.grad is not None]):
        # Divided before the sum, as torch does: the sum of float16 could overflow.
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket]).div_(ranks)
        dist.all_reduce(flat, group=group)
        pieces = torch.split(flat, [gradient.numel() for gradient in bucket])
        for gradient, piece in zip(bucket, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))
    for parameter in sparse:
        parameter.grad = _sparse_rows(parameter).coalesce() / ranks
        dist.all_reduce(parameter.grad, group=group)


def _sparse_rows(parameter: Tensor) -> Tensor:
    """Returns a gradient in the layout in which an embedding's is sparse: by rows."""
    if parameter.grad is None:
        nowhere = torch.zeros(1, 0, dtype=torch.int64, device=parameter.device)
        nothing = parameter.new_zeros(0, *parameter.shape[1:])
        return torch.sparse_coo_tensor(nowhere, nothing, parameter.shape)
    return parameter.grad if parameter.grad.is_sparse else parameter.grad.to_sparse(1)


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Puts gradients together that can be sent at once."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for gradient in gradients:
        kinds.setdefault((gradient.dtype, gradient.device), []).append(gradient)
    for kind in kinds.values():
        bucket: list[Tensor] = []
        size = 0
        for gradient in kind:
            if bucket and size + gradient.nbytes > _BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(gradient)
            size += gradient.nbytes
        yield bucket

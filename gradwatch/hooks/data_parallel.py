"""Ranks that average gradients: which they are, when they communicate, and how to defer it."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from gradwatch.measure.sharded import is_sharded, local_part


def is_distributed() -> bool:
    """Tells whether a process group is set up."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Returns the rank of this process; 0 where there is no process group."""
    return dist.get_rank() if is_distributed() else 0


FSDP1 = (
    "watch(model=) got a model with FullyShardedDataParallel in it (FSDP1), whose flattened "
    "parameters show each rank another part of the gradients: norms would be wrong, and each rank "
    "would clip by its own. Shard the model with torch.distributed.fsdp.fully_shard() instead, or "
    "with ShardingStrategy.NO_SHARD or DistributedDataParallel if it fits on one device."
)


def fully_sharded(model: object) -> Iterator[nn.Module]:
    """Lists the modules of a model that ``fully_shard`` (FSDP2) was applied to."""
    kind = _kind("FSDPModule")
    modules = model.modules() if isinstance(model, nn.Module) and kind is not None else ()
    return (module for module in modules if isinstance(module, kind))


def refuse_fsdp1(model: object) -> None:
    """Refuses a model whose gradients no rank can see rightly.

    Args:
        model: What is to be watched.

    Raises:
        ValueError: If it holds a ``FullyShardedDataParallel`` that shards anything.
    """
    kind = _kind("FullyShardedDataParallel")
    modules = model.modules() if isinstance(model, nn.Module) and kind is not None else ()
    for module in modules:
        if isinstance(module, kind):
            strategy: Any = getattr(module, "sharding_strategy", None)
            if getattr(strategy, "name", "") != "NO_SHARD":
                raise ValueError(FSDP1)


def reshard(model: object) -> None:
    """Has FSDP2 put its shards back in place of whole parameters.

    After a forward without a backward, the outermost module still holds the whole parameters,
    which are other tensors than those that the optimizer has. The next forward gathers them anew.

    Args:
        model: What is to be watched.
    """
    for module in fully_sharded(model):
        if not all(map(is_sharded, module.parameters())):
            _reshard(module)


def _reshard(module: Any) -> None:
    module.reshard()


def _kind(name: str) -> Any:
    return getattr(sys.modules.get("torch.distributed.fsdp"), name, None)


DIFFERENT_RANKS = (
    "The model's gradients are averaged over different ranks: some over {first}, others over "
    "{second}, and neither contains the other. What the micro-batches of all ranks weigh together "
    "has no one answer then. Use one process group, or one mesh, for all wrappers of the model."
)

BUCKET_BYTES = 25 * 2**20  # as a wrapper has by default
_NONE, _DENSE, _SPARSE = 0, 1, 2


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

        Args:
            model: What is watched.

        Returns:
            The ranks; None where there is no data parallelism, or only one rank of it.

        Raises:
            ValueError: If gradients are averaged over ranks of which none contain all others.
        """
        wrappers = wrappers_of(model)
        teams = [_Team.of_group(wrapper.process_group) for wrapper in wrappers]
        for module in fully_sharded(model):
            # The mesh of a parameter may have more dimensions, as under tensor parallelism.
            teams += [_Team.of_mesh(group.mesh_info.mesh) for group in parameter_groups(module)]
        widest = max(teams, key=lambda team: len(team.members), default=None)
        if widest is None or len(widest.members) == 1:
            return None
        for team in teams:
            if not team.members <= widest.members:
                first, second = sorted(widest.members), sorted(team.members)
                raise ValueError(DIFFERENT_RANKS.format(first=first, second=second))
        return cls(ranks=len(widest.members), wrappers=wrappers, groups=widest.groups)

    def add_up_(self, numbers: Tensor) -> Tensor:
        """Adds numbers up over the ranks, in place.

        Args:
            numbers: Tensor on the device of the model, of the same shape on every rank.

        Returns:
            The same tensor.
        """
        for group in self.groups:
            dist.all_reduce(numbers, group=group)
        return numbers

    def largest_(self, numbers: Tensor) -> Tensor:
        """Takes the largest of each number over the ranks, in place.

        Args:
            numbers: Tensor on the device of the model, of the same shape on every rank.

        Returns:
            The same tensor.
        """
        for group in self.groups:
            dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=group)
        return numbers


def wrappers_of(model: object) -> list[DistributedDataParallel]:
    """Lists the wrappers that reduce a model's gradients.

    They are the model or are in it, or else have it in them: a loop may call the wrapper and have
    the bare module watched.

    Args:
        model: What is watched.
    """
    if not isinstance(model, nn.Module):
        return []
    inside = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    return inside if inside or not is_distributed() else list(_around(model))


def all_wrappers() -> list[DistributedDataParallel]:
    """Lists the wrappers of the process; torch keeps no list of them."""
    # The class of an object, not isinstance(): that asks proxies, which may answer with an error.
    return [one for one in gc.get_objects() if issubclass(type(one), DistributedDataParallel)]


def parameter_groups(module: nn.Module) -> list[Any]:
    """Lists what FSDP2 communicates at once of a module that ``fully_shard`` was applied to.

    Args:
        module: The module.

    Returns:
        torch's private records; empty for a module whose parameters are all in inner ones.
    """
    state: Any = module._get_fsdp_state()  # type: ignore[operator]
    # Older versions of torch have one group at most, under the singular name.
    if not hasattr(state, "_fsdp_param_groups"):
        return [group for group in [state._fsdp_param_group] if group is not None]
    return list(state._fsdp_param_groups)


def align_gradients_(parameters: Sequence[Tensor], group: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Gives a parameter that has a dense gradient on another rank one of zeros here.

    It waits for the device once.

    Args:
        parameters: The same on every rank, in the same order.
        group: The process group.

    Returns:
        The parameters with a dense gradient and those with a sparse one; the others have none on
        any rank.
    """
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


def average_gradients_(dense: Sequence[Tensor], sparse: Sequence[Tensor], group: Any) -> None:
    """Averages gradients over ranks, in place, as a wrapper would at the end of a backward.

    Args:
        dense: Parameters with a dense gradient, the same on every rank, in the same order.
        sparse: Those with a sparse one.
        group: The process group.
    """
    ranks = dist.get_world_size(group)
    for bucket in _buckets([local_part(p.grad) for p in dense if p.grad is not None]):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket]).div_(ranks)
        dist.all_reduce(flat, group=group)
        pieces = torch.split(flat, [gradient.numel() for gradient in bucket])
        for gradient, piece in zip(bucket, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))
    for parameter in sparse:
        parameter.grad = _rows(parameter).coalesce() / ranks
        dist.all_reduce(parameter.grad, group=group)


def _rows(parameter: Tensor) -> Tensor:
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
            if bucket and size + gradient.nbytes > BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(gradient)
            size += gradient.nbytes
        yield bucket


@dataclass(frozen=True, slots=True)
class _Team:
    """Ranks that average some parameters, and the process groups that reach all of them."""

    members: frozenset[int]
    groups: list[Any]

    @classmethod
    def of_group(cls, group: Any) -> _Team:
        return cls(frozenset(dist.get_process_group_ranks(group)), [group])

    @classmethod
    def of_mesh(cls, mesh: Any) -> _Team:
        members = frozenset(mesh.mesh.flatten().tolist())
        whole_world = mesh.ndim > 1 and len(members) == dist.get_world_size()
        groups = [None] if whole_world else [mesh.get_group(d) for d in range(mesh.ndim)]
        return cls(members, groups)


def _around(model: nn.Module) -> Iterator[DistributedDataParallel]:
    """Finds the wrappers of the process that have a model in them."""
    for wrapper in all_wrappers():
        wrapped = getattr(wrapper, "module", None)
        if wrapped is not None and any(part is model for part in wrapped.modules()):
            yield wrapper


def broadcast_buffers(wrappers: Iterable[DistributedDataParallel]) -> None:
    """Has the next forwards of wrappers not broadcast their buffers: it is done here, if at all.

    A rank whose forward fails, or that fails before it, leaves the others waiting in it. All ranks
    must call it.

    Args:
        wrappers: The same on every rank, in the same order.
    """
    each: Iterable[Any] = wrappers  # torch leaves these methods without annotations
    for wrapper in each:
        if wrapper._check_sync_bufs_pre_fwd():
            wrapper._sync_buffers()
        # As after a forward that was held back. To reduce what was held back sets it again.
        wrapper.require_forward_param_sync = False


CANNOT_DEFER = (
    "A window ended early, after a backward that did not communicate, and its gradients cannot be "
    "reduced afterwards: {why}. Say beforehand where a window ends: iterate over "
    "watcher.micro_batches(...), or give the exact size of every window."
)
NO_SUCH_API = "torch {version} does it in another way than gradwatch knows ({error})"
STILL_KEPT = "torch {version} still keeps some of them"
SPARSE_HOOK = "a communication hook is registered, and some of them are sparse"


class GradientSync:
    """Keeps all but the last micro-batch of a window from communicating.

    The flags are read by a micro-batch's forward and by its backward: set them before both.

    Attributes:
        is_held: Whether anything is held back in the next micro-batch.
    """

    def __init__(self, parts: Sequence[_Part]) -> None:
        """Starts with the flags as they are.

        Args:
            parts: What communicates.
        """
        self._parts = parts
        self._handles: list[RemovableHandle] = []
        self.is_held = False

    @classmethod
    def of(cls, model: object, data_parallel: DataParallel | None) -> GradientSync | None:
        """Makes one for a model.

        Args:
            model: What is watched.
            data_parallel: The ranks that average its gradients; None where they are not known.

        Returns:
            None where nothing communicates.
        """
        wrappers = wrappers_of(model) if data_parallel is None else data_parallel.wrappers
        sharded = list(fully_sharded(model))
        parts: list[_Part] = [_Wrapped(wrappers)] if wrappers else []
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
        if modules and isinstance(model, nn.Module) and hasattr(model, "_orig_mod"):
            modules = [model]  # by torch.compile; inside, the hook would be compiled too
        for module in modules:
            if module._compiled_call_impl is None:
                self._handles.append(module.register_forward_pre_hook(hook))

    def detach(self) -> None:
        """Takes the hooks off, and puts the flags back as the user had set them."""
        self.restore()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def hold_back(self) -> None:
        """Has the next forwards and backwards not communicate gradients, where that is possible."""
        held = [part.set(syncing=False) for part in self._parts]
        self.is_held = any(held)

    def let_go(self) -> None:
        """Has the next forward and backward communicate what has been held back, and their own."""
        self.is_held = False
        for part in self._parts:
            part.set(syncing=True)

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


class _Part(Protocol):
    """One of the mechanisms of torch that communicate gradients."""

    @property
    def modules(self) -> Sequence[nn.Module]: ...

    def set(self, syncing: bool) -> bool:
        """Sets the flags; returns whether anything is held back now."""

    def restore(self) -> None: ...

    def reduce_(self) -> None: ...


class _Wrapped:
    """Wrappers, which leave the local sum in the gradients of a micro-batch that is held back."""

    def __init__(self, wrappers: Sequence[DistributedDataParallel]) -> None:
        self.modules: Sequence[nn.Module] = wrappers
        self._wrappers = wrappers
        self._before: list[bool] | None = None
        self._held: list[DistributedDataParallel] = []

    def set(self, syncing: bool) -> bool:
        if self._before is None:
            self._before = [wrapper.require_backward_grad_sync for wrapper in self._wrappers]
        held = [] if syncing else [wrapper for wrapper in self._wrappers if can_hold(wrapper)]
        for wrapper in self._wrappers:
            wrapper.require_backward_grad_sync = wrapper not in held
        # Not forgotten by let_go(): the backward that it waits for may never come.
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
        self.modules: Sequence[nn.Module] = modules[:1]
        self._modules: Sequence[Any] = modules
        self._before: list[tuple[Any, bool, bool]] = []

    def set(self, syncing: bool) -> bool:
        self._before = self._before or self._flags()
        for module in self._modules:
            module.set_requires_gradient_sync(syncing, recurse=False)
        return not syncing

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
        states = [module._get_fsdp_state() for module in self._modules]
        for module, state in zip(reversed(self._modules), reversed(states), strict=True):
            # None until the first forward, before which there is nothing to reduce.
            if state._is_root is not None:
                for group in reversed(parameter_groups(module)):
                    group.post_backward()
        for state in states:
            if state._is_root:
                _finish(state)
        if any(_keeps(group) for group, _, _ in self._flags()):
            why = STILL_KEPT.format(version=torch.__version__)
            raise RuntimeError(CANNOT_DEFER.format(why=why))

    def _flags(self) -> list[tuple[Any, bool, bool]]:
        groups = [group for module in self._modules for group in parameter_groups(module)]
        return [(group, group.reduce_grads, group.all_reduce_grads) for group in groups]


def can_hold(wrapper: DistributedDataParallel) -> bool:
    """Tells whether a wrapper's next micro-batch may be held back.

    With ``static_graph=True`` torch fails in the first backward of all unless it communicates
    (pytorch#143580).

    Args:
        wrapper: The wrapper.
    """
    # What torch calls so is set by the first backward.
    begun: bool = getattr(wrapper, "_static_graph_delay_allreduce_enqueued", False)
    return begun or not wrapper.static_graph


def _set_flags(flags: Sequence[tuple[Any, bool, bool]]) -> None:
    for group, reduce, all_reduce in flags:
        group.reduce_grads, group.all_reduce_grads = reduce, all_reduce


def _finish(root: Any) -> None:
    """Has FSDP2 do what it does at the end of a backward that communicated."""
    context = root._state_ctx
    before, context.is_last_backward = context.is_last_backward, True
    try:
        root._root_post_backward_final_callback()
    finally:
        context.is_last_backward = before


def _keeps(group: Any) -> bool:
    for kept in group.fsdp_params:
        whole = getattr(kept, "_unsharded_param", None)
        if kept.unsharded_accumulated_grad is not None:
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
    dense, sparse = align_gradients_(parameters, group)
    if hooked and sparse:
        raise RuntimeError(CANNOT_DEFER.format(why=SPARSE_HOOK))
    if hooked:
        _run_hook_(wrapper.reducer)
    else:
        average_gradients_(dense, sparse, group)


def _run_hook_(reducer: Any) -> None:
    """Has a wrapper's own communication hook reduce its gradients: it may not be a mean at all."""
    for bucket in reducer._get_zeros_like_grad_buckets():
        _copy_(bucket.gradients(), [p.grad for p in bucket.parameters()])
        reduced = reducer._run_comm_hook(bucket).wait()
        bucket.set_buffer(reduced if isinstance(reduced, Tensor) else reduced[0])
        _copy_([p.grad for p in bucket.parameters()], bucket.gradients())


def _copy_(targets: Sequence[Tensor | None], sources: Sequence[Tensor | None]) -> None:
    for target, source in zip(targets, sources, strict=True):
        if target is not None and source is not None:
            target.copy_(source)

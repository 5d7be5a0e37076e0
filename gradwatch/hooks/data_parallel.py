"""The ranks that average gradients: which they are, when they communicate, how to defer it.

The private API of FSDP2 and DistributedDataParallel (DDP) is used in this file only; "wrappers" are
instances of DDP. The private names of DDP were seen on torch 2.4 to 2.13, those of FSDP2 on 2.9 to
2.13.

DDP keeps the local sum of the gradients in ``.grad`` while it does not communicate (``no_sync()``).
FSDP2 keeps it in private fields, and ``.grad`` stays as it was until the reduction. This is why
holding back and reducing afterwards are written once for each (:class:`_Wrapped`,
:class:`_Sharded`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from gradwatch.hooks.instances import instances_of
from gradwatch.measure.parameters import is_sharded, local_part, wraps

FSDP1 = (
    "watch(model=) got a model with FullyShardedDataParallel in it (FSDP1), whose flattened "
    "parameters show each rank a different part of the gradients, or none of their names, and only "
    "after its own clip: norms would be wrong, and each rank would clip by its own. Shard it with "
    "torch.distributed.fsdp.fully_shard() instead, or use DistributedDataParallel if it fits on "
    "one device, in place of ShardingStrategy.NO_SHARD."
)
DIFFERENT_RANKS = (
    "The model's gradients are averaged over different ranks: some over {first}, others over "
    "{second}, and neither contains the other. So the total weight of the micro-batches of all "
    "ranks is not defined. Use one process group, or one mesh, for all wrappers of the model."
)
CANNOT_DEFER = (
    "A window ended early, after a backward that did not communicate, and its gradients cannot be "
    "reduced afterwards: {why}. Say beforehand where a window ends: iterate over "
    "watcher.micro_batches(...), or give the exact size of every window."
)
NO_SUCH_API = "torch {version} does this in a way that gradwatch does not know ({error})"
STILL_KEPT = "torch {version} still keeps some of them"
SPARSE_HOOK = "a communication hook is registered, and some of them are sparse"


# -- which ranks -----------------------------------------------------------------------------------


def is_distributed() -> bool:
    """Returns whether a process group is set up."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Returns the rank of this process; 0 if it is the only one.

    Before a process group is set up, it is the rank that the launcher has announced in the
    environment.
    """
    return dist.get_rank() if is_distributed() else _announced_rank()


def several_ranks() -> bool:
    """Returns whether this process is one of several, as :func:`rank` knows."""
    return group_size() > 1 if is_distributed() else _number("WORLD_SIZE", 1) > 1


def _announced_rank() -> int:
    # torchrun sets all three. Lightning's launcher of processes sets no RANK. RANK alone says
    # nothing: a job array may set it for its own purposes.
    ranks = _number("WORLD_SIZE", 1)
    announced = _number("RANK", _number("LOCAL_RANK", 0))
    return announced if 0 <= announced < ranks else 0


def _number(variable: str, default: int) -> int:
    try:
        return int(os.environ.get(variable, ""))
    except ValueError:  # not set, or set for something else
        return default


@dataclass(frozen=True, slots=True, eq=False)
class DataParallel:
    """The ranks over which a model's gradients are averaged; each of them sees other data.

    Attributes:
        ranks: The number of ranks, at least 2.
        wrappers: The wrappers that average the model's gradients; empty if FSDP2 averages them.
        groups: Process groups to reduce over, one after the other; nearly always one. None stands
            for the whole world.
    """

    ranks: int
    wrappers: list[DistributedDataParallel]
    groups: list[Any]

    @classmethod
    def of(
        cls, model: object, wrappers: Sequence[DistributedDataParallel] | None = None
    ) -> DataParallel | None:
        """Finds the ranks over which a model's gradients are averaged.

        Under tensor parallelism the ranks that share one copy of the data count once. If some
        parameters are averaged over fewer ranks than others, as experts may be, the largest set
        of ranks counts. Without ``wrappers`` they are searched for.

        Returns:
            The ranks; None without data parallelism, or if it has only one rank.

        Raises:
            ValueError: If no set of ranks contains all the others.
        """
        wrappers = wrappers_of(model) if wrappers is None else list(wrappers)
        # Sets of ranks that average some of the parameters, and the process groups that reach them.
        found: list[tuple[frozenset[int], list[Any]]] = [
            (frozenset(dist.get_process_group_ranks(w.process_group)), [w.process_group])
            for w in wrappers
        ]
        for module in fully_sharded(model):
            # The mesh of FSDP2's own communication. That of a parameter has further dimensions
            # under tensor parallelism.
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
        """Sums a tensor over the ranks, in place, and returns it; it is on the model's device."""
        for group in self.groups:
            dist.all_reduce(numbers, group=group)
        return numbers

    def max_(self, numbers: Tensor) -> Tensor:
        """Reduces a tensor to its elementwise maximum over the ranks, in place, and returns it."""
        for group in self.groups:
            dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=group)
        return numbers


def _ranks_of(mesh: Any) -> tuple[frozenset[int], list[Any]]:
    ranks = frozenset(mesh.mesh.flatten().tolist())
    # A mesh has one process group per dimension. If they span the whole world, one all-reduce over
    # the world does the work of several.
    whole_world = mesh.ndim > 1 and len(ranks) == dist.get_world_size()
    return ranks, [None] if whole_world else [mesh.get_group(d) for d in range(mesh.ndim)]


# -- DistributedDataParallel -----------------------------------------------------------------------


def wrappers_of(model: object) -> list[DistributedDataParallel]:
    """Lists the wrappers that reduce a model's gradients.

    These are the model itself or modules inside it. If there are none, they are the wrappers that
    contain the model: a loop may call the wrapper but watch the bare module.
    """
    if not isinstance(model, nn.Module):
        return []
    inside = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    return inside if inside or not is_distributed() else list(_around(model))


def _around(model: nn.Module) -> Iterator[DistributedDataParallel]:
    """Finds the wrappers of the process that contain a model."""
    for wrapper in all_wrappers():
        # A wrapper whose constructor raised has no module, but the traceback keeps it alive.
        wrapped = getattr(wrapper, "module", None)
        if wrapped is not None and any(part is model for part in wrapped.modules()):
            yield wrapper


def all_wrappers() -> list[DistributedDataParallel]:
    """Lists all wrappers of the process."""
    return instances_of(DistributedDataParallel)


def wrappers_that_hold(tensors: Iterable[Tensor]) -> list[DistributedDataParallel]:
    """Searches the process for the wrappers that average any of some parameters."""
    wanted = set(map(id, tensors))
    return [
        wrapper
        for wrapper in all_wrappers()
        if getattr(wrapper, "module", None) is not None
        and not wanted.isdisjoint(map(id, wrapper.module.parameters()))
    ]


def takes_the_mean(wrapper: DistributedDataParallel) -> bool:
    """Returns whether a wrapper averages over all its ranks, and has no communication hook."""
    return not getattr(wrapper, "_comm_hooks", ())


def is_reducing(wrapper: DistributedDataParallel) -> bool | None:
    """Returns whether a wrapper is reducing the gradients of the backward that is running.

    To be called when all gradients have arrived, and before the end of the backward. A wrapper
    reduces only what its own forward has announced: not a backward of the module inside it, nor one
    under ``no_sync()``.

    Returns:
        None if torch does not tell, as under compiled autograd. The very first reduction of a
        static graph is over by then, so the answer is False.
    """
    state: Any = wrapper
    if getattr(state, "_use_python_reducer", True):
        return None
    if getattr(state, "_delay_all_reduce_all_params", False):
        return None
    try:
        # Nothing else tells the state of the reducer. The method raises while a reduction is under
        # way, which takes some 0.1 ms.
        state._check_reducer_finalized()
    except RuntimeError:
        return True
    except AttributeError:
        return None
    return False


def can_hold(wrapper: DistributedDataParallel) -> bool:
    """Returns whether a wrapper's next micro-batch may be held back."""
    # With static_graph=True the very first backward must communicate, or torch fails
    # (pytorch#143580). Despite its name, the flag says whether that backward has begun.
    begun: bool = getattr(wrapper, "_static_graph_delay_allreduce_enqueued", False)
    return begun or not wrapper.static_graph


def broadcast_buffers(wrappers: Iterable[DistributedDataParallel]) -> None:
    """Broadcasts the buffers that the next forwards would broadcast, so that these do not.

    A forward that communicates leaves the other ranks waiting if one rank fails before it. All
    ranks must call this function, with the same wrappers in the same order.
    """
    each: Iterable[Any] = wrappers  # torch has no annotations for these methods
    for wrapper in each:
        if wrapper._check_sync_bufs_pre_fwd():
            wrapper._sync_buffers()
        # The state after a forward that was held back: the next forward does not broadcast.
        # _Wrapped.reduce_() sets the flag again.
        wrapper.require_forward_param_sync = False


@contextmanager
def undisturbed_communication() -> Iterator[None]:
    """Turns off the communication of all data-parallel wrappers in this process for the block.

    ``DistributedDataParallel`` expects a backward after every forward whose gradients it will
    reduce, and does not notice ``torch.autograd.grad``: its next forward would refuse to run. All
    wrappers, because a loss may call other models too, such as the critic of a generator.
    """
    flags = ("require_backward_grad_sync", "require_forward_param_sync")
    there = all_wrappers() if is_distributed() else []
    # A wrapper whose constructor failed may lack the flags.
    saved = [
        (one, flag, getattr(one, flag)) for one in there for flag in flags if hasattr(one, flag)
    ]
    try:
        for wrapper, flag, _ in saved:
            setattr(wrapper, flag, False)
        yield
    finally:
        for wrapper, flag, value in saved:
            setattr(wrapper, flag, value)


# -- FSDP ------------------------------------------------------------------------------------------


def fully_sharded(model: object) -> Iterator[nn.Module]:
    """Lists the modules of a model to which ``fully_shard`` (FSDP2) was applied."""
    return _modules_of_kind(model, "FSDPModule")


def refuse_fsdp1(model: object) -> None:
    """Refuses FSDP1, whose flattened parameters show no rank the norms of real parameters.

    Raises:
        ValueError: If the model contains a ``FullyShardedDataParallel``.
    """
    # NO_SHARD as well: the reduced gradients appear only after the backward has ended.
    if next(_modules_of_kind(model, "FullyShardedDataParallel"), None) is not None:
        raise ValueError(FSDP1)


def _modules_of_kind(model: object, name: str) -> Iterator[nn.Module]:
    # Importing the package takes long. If nobody has imported it, no such module exists. Before
    # torch 2.6 it has no FSDPModule.
    kind: Any = getattr(sys.modules.get("torch.distributed.fsdp"), name, None)
    modules = model.modules() if isinstance(model, nn.Module) and kind is not None else ()
    return (module for module in modules if isinstance(module, kind))


def reshard(model: object) -> None:
    """Makes FSDP2 put its sharded parameters back in place of the gathered ones.

    After a forward without a backward, the outermost module still holds the gathered parameters.
    These are not the tensors that the optimizer holds. The next forward gathers them again.
    """
    sharded: Iterator[Any] = fully_sharded(model)
    for module in sharded:
        if not all(map(is_sharded, module.parameters())):
            module.reshard()


def shards_of(module: Any) -> Iterator[tuple[nn.Module, Tensor]]:
    """Lists the sharded parameters of a module that FSDP2 was applied to, each with its holder.

    These are what the optimizer holds, also while the modules hold the gathered parameters. There
    are none in another module, nor in those inside of it that have shards of their own.
    """
    kind: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if kind is None or not issubclass(type(module), kind):
        return
    for group in _parameter_groups(module):
        for parameter in group.fsdp_params:
            yield parameter._module_info.module, parameter.sharded_param


def _parameter_groups(module: Any) -> list[Any]:
    """Lists the groups of parameters that FSDP2 communicates together for a module.

    The list is empty if all of its parameters belong to inner modules with groups of their own.
    """
    # Only this private state knows the mesh that gradients are averaged over, and the flags that
    # the user has set.
    state = module._get_fsdp_state()
    # Older versions of torch have at most one group, under the singular name.
    if not hasattr(state, "_fsdp_param_groups"):
        return [group for group in [state._fsdp_param_group] if group is not None]
    return list(state._fsdp_param_groups)


# -- holding back, and reducing afterwards ---------------------------------------------------------


class GradientSync:
    """Keeps all but the last micro-batch of a window from communicating.

    A micro-batch's forward and backward both read the flags, so they must be set before the
    forward.

    Attributes:
        is_held: Whether the next micro-batch is held back, wholly or in part.
    """

    def __init__(self, parts: Sequence[_Wrapped | _Sharded]) -> None:
        """Starts without changing any flag."""
        self._parts = parts
        self._handles: list[RemovableHandle] = []
        self.is_held = False

    @classmethod
    def of(cls, model: object, data_parallel: DataParallel | None) -> GradientSync | None:
        """Makes one for a watched model; None if nothing in it communicates.

        Without ``data_parallel`` the wrappers are searched for.
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
        """Registers a forward pre-hook on the modules whose forward begins a micro-batch.

        ``model`` is the watched model. If it is compiled, the hook is registered on it instead.
        """
        modules = self.modules
        # On the inner module of a torch.compile() wrapper, the hook would be compiled as well.
        if modules and isinstance(model, nn.Module) and wraps(model, "_orig_mod"):
            modules = [model]
        for module in modules:
            if module._compiled_call_impl is None:
                self._handles.append(module.register_forward_pre_hook(hook))

    def detach(self) -> None:
        """Removes the hooks and restores the flags that the user had set."""
        self.restore()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def let_go(self) -> None:
        """Drops the modules, after :meth:`detach`."""
        self._parts = []

    def hold_back(self) -> None:
        """Makes the next forwards and backwards not communicate gradients, as far as possible."""
        held = [part.hold_back() for part in self._parts]  # any() alone would stop at the first
        self.is_held = any(held)

    def restore(self) -> None:
        """Restores the flags that the user had set; safe to call again."""
        self.is_held = False
        for part in self._parts:
            part.restore()

    @torch.no_grad()
    def reduce_(self) -> None:
        """Averages the gradients that were held back, after their last backward.

        All ranks must call it. Up to rounding, the gradients become what they would be if the last
        micro-batch had communicated. No flag changes, and averaging twice is harmless.

        Raises:
            RuntimeError: If this version of torch offers no known way to do this.
        """
        try:
            for part in self._parts:
                part.reduce_()
        except AttributeError as error:  # most of the names that it needs are private to torch
            why = NO_SUCH_API.format(version=torch.__version__, error=error)
            raise RuntimeError(CANNOT_DEFER.format(why=why)) from error


class _Wrapped:
    """DDP wrappers, which leave this rank's own sum in ``.grad`` while they are held back."""

    def __init__(self, wrappers: Sequence[DistributedDataParallel]) -> None:
        self.modules: Sequence[nn.Module] = wrappers
        self._wrappers = wrappers
        self._before: list[bool] | None = None
        self._held: list[DistributedDataParallel] = []

    def hold_back(self) -> bool:
        """Sets the flags; returns whether anything is held back now."""
        # This is the flag that no_sync() sets. The context manager itself would have to stay open
        # while the user's code runs, and if it were never closed, the flag would stay set.
        if self._before is None:
            self._before = [wrapper.require_backward_grad_sync for wrapper in self._wrappers]
        held = [wrapper for wrapper in self._wrappers if can_hold(wrapper)]
        for wrapper in self._wrappers:
            wrapper.require_backward_grad_sync = wrapper not in held
        # restore() keeps this list: if no backward of this window communicates any more, reduce_()
        # needs it.
        self._held = held or self._held
        return bool(held)

    def restore(self) -> None:
        for wrapper, before in zip(self._wrappers, self._before or [], strict=False):
            wrapper.require_backward_grad_sync = before
        self._before = None

    def reduce_(self) -> None:
        done: set[int] = set()
        for wrapper in self._held:
            # An unused wrapper of the same parameters may still be in memory on some ranks only.
            # Each parameter is averaged once, by the first wrapper that has it.
            parameters = [p for p in reduced_by(wrapper) if id(p) not in done]
            done.update(map(id, parameters))
            if parameters and dist.get_world_size(wrapper.process_group) > 1:
                _average_(wrapper, parameters)
            # The state after a micro-batch that communicated: the next forward broadcasts buffers.
            wrapper.require_forward_param_sync = True


class _Sharded:
    """FSDP2 modules, which keep the gradients of held-back micro-batches in private fields."""

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
        """Runs the hooks that FSDP2 runs in a backward that communicates, without a backward."""
        # No public function reduces the gradients that set_requires_gradient_sync(False) has kept.
        # A backward of a zero loss would, but it needs the graph of every module.
        states = [module._get_fsdp_state() for module in self._modules]
        # The last module first, as in a backward: all ranks must communicate in the same order.
        for module, state in zip(reversed(self._modules), reversed(states), strict=True):
            # _is_root is None until the first forward; before it there is nothing to reduce.
            if state._is_root is not None:
                for group in reversed(_parameter_groups(module)):
                    group.post_backward()
        for state in states:
            if state._is_root:
                _finish_backward(state)
        # In a newer torch the hooks might run under other conditions: then nothing raises, but the
        # gradients have not been reduced.
        if any(_keeps_gradients(group) for group, _, _ in self._flags()):
            why = STILL_KEPT.format(version=torch.__version__)
            raise RuntimeError(CANNOT_DEFER.format(why=why))

    def _flags(self) -> list[tuple[Any, bool, bool]]:
        # The attributes behind the public setters, as there are no getters.
        groups = [group for module in self._modules for group in _parameter_groups(module)]
        return [(group, group.reduce_grads, group.all_reduce_grads) for group in groups]


def _set_flags(flags: Sequence[tuple[Any, bool, bool]]) -> None:
    for group, reduce, all_reduce in flags:
        group.reduce_grads, group.all_reduce_grads = reduce, all_reduce


def _finish_backward(root: Any) -> None:
    """Makes FSDP2 do what it does at the end of a backward that communicated."""
    context = root._state_ctx
    # If this is False (set_is_last_backward), FSDP2 does not wait for the reductions.
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


def reduced_by(wrapper: DistributedDataParallel, *, frozen: bool = False) -> list[Tensor]:
    """Lists the parameters that a wrapper reduces, or those that it would if they weren't frozen.

    A wrapper reduces what required a gradient when it was made.
    """
    ignored = wrapper.parameters_to_ignore
    named = wrapper.module.named_parameters()
    return [p for name, p in named if p.requires_grad is not frozen and name not in ignored]


def ignored_by(wrapper: DistributedDataParallel) -> list[Tensor]:
    """Lists the parameters that a wrapper was told to ignore, and that require a gradient."""
    ignored = wrapper.parameters_to_ignore
    named = wrapper.module.named_parameters()
    return [p for name, p in named if p.requires_grad and name in ignored]


def group_size(wrapper: DistributedDataParallel | None = None) -> int:
    """Returns the number of ranks of a wrapper, or of the whole world; 1 if its group is gone."""
    try:
        return dist.get_world_size(None if wrapper is None else wrapper.process_group)
    except (RuntimeError, ValueError):
        return 1


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
    """Reduces gradients with a wrapper's own communication hook, which need not be a plain mean."""
    # A communication hook takes a GradBucket, which only the reducer can make.
    for bucket in reducer._get_zeros_like_grad_buckets():
        _copy_(bucket.gradients(), [p.grad for p in bucket.parameters()])
        reduced = reducer._run_comm_hook(bucket).wait()
        # Some futures give a list of one tensor, others the tensor itself.
        bucket.set_buffer(reduced if isinstance(reduced, Tensor) else reduced[0])
        _copy_([p.grad for p in bucket.parameters()], bucket.gradients())


def _copy_(targets: Sequence[Tensor | None], sources: Sequence[Tensor | None]) -> None:
    for target, source in zip(targets, sources, strict=True):
        if target is not None and source is not None:
            target.copy_(source)


_BUCKET_BYTES = 25 * 2**20  # the default of DDP
_NONE, _DENSE, _SPARSE = 0, 1, 2


def _align_gradients_(
    parameters: Sequence[Tensor], group: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Adds gradients of zeros, so that every rank has the same dense gradients.

    ``parameters`` must be the same on every rank, in the same order.

    Returns:
        The parameters with a dense gradient on any rank, and those with a sparse one. The others
        have none on any rank.
    """
    # A collective in which the ranks send different numbers of elements hangs or mixes them up, so
    # the ranks first agree on the layouts. tolist() waits for the device, once.
    local = [
        _NONE if p.grad is None else _SPARSE if p.grad.is_sparse else _DENSE for p in parameters
    ]
    layouts = torch.tensor(local, dtype=torch.uint8, device=parameters[0].device)
    dist.all_reduce(layouts, op=dist.ReduceOp.MAX, group=group)
    found: dict[int, list[Tensor]] = {_NONE: [], _DENSE: [], _SPARSE: []}
    for parameter, layout in zip(parameters, layouts.cpu().tolist(), strict=True):
        found[layout].append(parameter)
        if layout == _DENSE and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return found[_DENSE], found[_SPARSE]


def _average_gradients_(dense: Sequence[Tensor], sparse: Sequence[Tensor], group: Any) -> None:
    """Averages gradients over ranks, in place, as DDP would at the end of a backward."""
    ranks = dist.get_world_size(group)
    for bucket in _buckets([local_part(p.grad) for p in dense if p.grad is not None]):
        # Divided before the sum, as DDP does: a sum in float16 could overflow.
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket]).div_(ranks)
        dist.all_reduce(flat, group=group)
        pieces = torch.split(flat, [gradient.numel() for gradient in bucket])
        for gradient, piece in zip(bucket, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))
    for parameter in sparse:
        parameter.grad = _sparse_rows(parameter).coalesce() / ranks
        dist.all_reduce(parameter.grad, group=group)


def _sparse_rows(parameter: Tensor) -> Tensor:
    """Returns a gradient as a sparse tensor with one index per row, like that of an embedding."""
    if parameter.grad is None:
        nowhere = torch.zeros(1, 0, dtype=torch.int64, device=parameter.device)
        nothing = parameter.new_zeros(0, *parameter.shape[1:])
        return torch.sparse_coo_tensor(nowhere, nothing, parameter.shape, device=parameter.device)
    return parameter.grad if parameter.grad.is_sparse else parameter.grad.to_sparse(1)


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Groups gradients of one dtype and device into buckets of at most 25 MiB, or one tensor."""
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

"""GradientSync: which micro-batches communicate their gradients, and how to make up for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from gradwatch.observe.data_parallel import (
    DataParallel,
    align_gradients_,
    average_gradients_,
    parameter_groups,
    wrappers_of,
)
from gradwatch.observe.fsdp import fully_sharded

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

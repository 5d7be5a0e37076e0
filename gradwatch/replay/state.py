"""Undisturbed: running a model again leaves the training as if it had not been run.

Weights and buffers are not put back but never touched: for as long as a replay lasts, the modules
hold copies. So no hook on a parameter is called, of the user, of DistributedDataParallel or of
gradwatch, no ``.grad`` of the training receives anything, and a forward that writes to its weights
writes to the copies. It lasts for forward and backward, as a checkpoint calls modules in the
backward.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_pre_hooks, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from gradwatch.hooks.context import backwards_permitted, is_replaying, replaying
from gradwatch.hooks.data_parallel import is_distributed
from gradwatch.hooks.generators import RandomState
from gradwatch.measure.parameters import (
    ParameterTable,
    named_modules,
    optimizer_parameters,
    unwrapped,
    wrapped_keys,
    wraps,
)
from gradwatch.replay.reach import Reach
from gradwatch.replay.stand_ins import ReplayError, StandIns

UNCOMPILED = "It was run again without torch.compile, whose kernels may round differently."
OWN_GENERATOR = (
    "The model draws random numbers from a generator of its own, or one that it is given, whose "
    "state at the forward is not known: the replay may have drawn others."
)
SHARDED = "The model is sharded over ranks, so that one rank cannot run it again by itself."
SCRIPTED = "{name} is a scripted module, whose weights cannot be replaced by copies."
COMMUNICATES = (
    "{what} communicates with other ranks, and this rank would wait for them for ever: they do not "
    "run the micro-batch again."
)
CANNOT_PUT_BACK = (
    "The forward takes items from {drawn}, which cannot be put back: the next batches would get "
    "others. So the micro-batch was not run again."
)
TAKES = (
    "The forward takes items from {drawn}, of which the replay has taken the next ones, and not "
    "those that the training had."
)
STEPS = "The closure steps an optimizer, so that running it again would move the weights."
WAITED = "Another thread of this process was replaying a micro-batch, and did not end."
LONGEST_WAIT = 60.0
"""Seconds that a thread waits for the replay of another one."""

MOST_BYTES = 2**30
"""The most that is copied of tensors that are neither in a module nor require a gradient."""

_SHARDING = {"FSDPModule", "FullyShardedDataParallel"}

Model: TypeAlias = nn.Module | Mapping[str, Tensor]


class Undisturbed:
    """What the block of :func:`undisturbed` computes with.

    Attributes:
        stand_ins: The copies.
        parameters: The copies of the model's parameters, by name.
        buffers: Those of its buffers, by name.
        attributes: Those of other tensors that are attributes of its modules, by name.
        modules: The modules by name, without torch's wrappers, outermost first.
        data: Copies of tensors that the functions have in variables, with their names.
        functions: The functions that the block may call, with copies of what they are given.
        notes: Sentences: what is different from how the training ran it.
    """

    def __init__(self, model: Model, reach: Reach) -> None:
        """Copies the tensors.

        Raises:
            ReplayError: If one cannot be copied.
        """
        self._reach = reach
        self.stand_ins = StandIns()
        self.functions: list[Callable[..., Any]] = []
        table = ParameterTable.of(model)
        slots = [s for one in reach.modules for s in (one._parameters, one._buffers)]
        for tensor in (*table.tensors, *(one for some in slots for one in some.values())):
            if tensor is not None:
                self.stand_ins.of(tensor)
        self.data = self._copy_data(reach)
        self.parameters = {
            name: self.stand_ins.of(tensor)
            for name, tensor in zip(table.names, table.tensors, strict=True)
        }
        listed = list(named_modules(model)) if isinstance(model, nn.Module) else []
        self.modules = [(name, one) for name, _, one in listed if not wrapped_keys(one)]
        self.buffers = {
            f"{name}.{key}" if name else key: self.stand_ins.of(buffer)
            for name, one in self.modules
            for key, buffer in one._buffers.items()
            if buffer is not None
        }
        self.attributes: dict[str, Tensor] = {}
        self._places: dict[str, tuple[dict[str, Any], str]] = {}
        for name, one in self.modules:
            prefix = f"{name}." if name else ""
            self._places |= {f"{prefix}{key}": (one._buffers, key) for key in one._buffers}
            for key, value in vars(one).items():
                copied = self.stand_ins.by_id.get(id(value)) if isinstance(value, Tensor) else None
                if copied is not None:
                    self.attributes[f"{prefix}{key}"] = copied
                    self._places[f"{prefix}{key}"] = vars(one), key
        self._unknown: dict[str, tuple[Tensor, int]] = {}
        self.notes = [UNCOMPILED] if reach.compiled else []
        if reach.draws:
            self.notes.append(OWN_GENERATOR)

    @torch.no_grad()
    def go_back(self, before: Mapping[int, Tensor], given: Collection[int]) -> None:
        """Gives the copies of buffers the values that they had before the forward.

        A forward that makes NaN often leaves it in a running statistic or a hidden state. Found
        there by a replay, it would seem to be the cause; see :meth:`doubtful`.

        Args:
            before: Values of buffers, by the ``id()`` of each as it is now.
            given: The ``id()`` of tensors that the forward is given, which stay as they are.
        """
        known = set()
        for tensor, name in self._reach.tensors.values():
            copied, then = self.stand_ins.by_id.get(id(tensor)), before.get(id(tensor))
            if copied is None or then is None or name or id(tensor) in given:
                continue
            if then.shape == copied.shape:
                copied.copy_(then)
                known.add(id(copied))
        self._unknown = {
            name: (copied, copied._version)
            for name, copied in (self.buffers | self.attributes).items()
            if id(copied) not in known
        }

    def doubtful(self) -> set[str]:
        """Names the buffers and attributes of which it is not known what they held before.

        These are those that the forward has written to: what is bad there may be its own doing.
        """
        return {
            name
            for name, (copied, version) in self._unknown.items()
            if copied._version != version or not self._is_in_place(name, copied)
        }

    def _is_in_place(self, name: str, copied: Tensor) -> bool:
        holder, key = self._places.get(name, ({}, ""))
        return holder.get(key) is copied

    def _copy_data(self, reach: Reach) -> list[tuple[Tensor, str]]:
        data, left = [], MOST_BYTES
        for tensor, name in reach.tensors.values():
            known = self.stand_ins.is_known(tensor)
            size = tensor.numel() * tensor.element_size()
            if known or tensor.requires_grad or size <= left:
                left -= 0 if known or tensor.requires_grad else size
                # A data set may be large, and nobody writes to it.
                copied = self.stand_ins.of(tensor)
            else:
                copied = tensor
            if name and not known:
                data.append((copied, name))
        return data


@contextmanager
def undisturbed(
    model: Model, *functions: Callable[..., Any], given: Iterable[object] = ()
) -> Iterator[Undisturbed]:
    """Lets a block run a model, forward and backward, and puts everything back that it changes.

    In the block gradients are recorded, whatever was so outside; gradwatch's own hooks do nothing;
    anomaly detection is off; compiled code runs uncompiled. Other threads go on as they are, but
    for those that replay as well, which wait. What is put back, also after an error or Ctrl-C:
    the tensors of modules and ``.grad``, attributes of modules and of objects that they hold
    (containers up to four deep), what hooks and ``functions`` have in closures, defaults and global
    variables, and the states of random generators.

    Args:
        model: The module, or a mapping from names to leaf tensors.
        functions: Other functions that the block will call, such as a closure.
        given: Other objects that the block will give them, and that are put back as well.

    Raises:
        ReplayError: If the model cannot be run again without disturbing the training.
    """
    with ExitStack() as stack:
        stack.enter_context(_one_at_a_time())
        interrupts = stack.enter_context(_Interrupts())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        # On an accelerator a backward runs in threads of torch's own, which have other frames and
        # number the nodes of a graph anew: neither a line nor an operation could be told.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        if torch.is_anomaly_enabled():
            stack.enter_context(torch.autograd.set_detect_anomaly(False))
        stack.callback(RandomState().put_back)
        stack.enter_context(replaying())
        stack.enter_context(backwards_permitted())
        stack.enter_context(_unwarned())
        watched = model if isinstance(model, nn.Module) else dict(model)
        others = list(given)
        reach = Reach([watched, *functions, *others])
        _refuse(reach)
        takes = _taken_from(reach, functions, others)
        block = Undisturbed(model, reach)
        leaves = [tensor for tensor, _ in reach.tensors.values() if tensor.is_leaf]
        leaves += [p for one in reach.optimizers for p in optimizer_parameters(one)]
        stack.enter_context(without_gradients(leaves))
        block.notes.extend(takes)
        stack.callback(reach.restore)
        stack.enter_context(_environment())
        reach.replace(block.stand_ins.by_id)
        block.stand_ins.swapped = reach.swapped
        block.functions = list(map(reach.swapped, functions))
        _unwrap(reach.modules)
        stack.enter_context(_uncompiled())
        stack.enter_context(_without_cached_weights(set(map(id, reach.modules))))
        stack.enter_context(_no_steps())
        if is_distributed() and dist.get_world_size() > 1:
            stack.enter_context(_NoCollectives())  # type: ignore[no-untyped-call]
        with interrupts.let_through():
            yield block


_TURN = threading.RLock()


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Waits until no other thread replays: some of what is replaced is there once in a process."""
    if not _TURN.acquire(timeout=LONGEST_WAIT):
        raise ReplayError(WAITED)
    try:
        yield
    finally:
        _TURN.release()


class _Interrupts:
    """Holds Ctrl-C back until everything is put back, but for the part that may be left early."""

    def __init__(self) -> None:
        self._known: Any = None
        self._held: list[tuple[int, Any]] = []
        self._lets_through = False

    def __enter__(self) -> _Interrupts:
        # Python calls handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            known = signal.getsignal(signal.SIGINT)
            if callable(known):
                self._known = known
                signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._known is not None:
            # The function that is run may have set a handler of its own.
            if signal.getsignal(signal.SIGINT) == self._handle:
                signal.signal(signal.SIGINT, self._known)
            for number, frame in self._held:
                self._known(number, frame)

    @contextmanager
    def let_through(self) -> Iterator[None]:
        """Lets one through in a block, which ends the block if it raises."""
        self._lets_through = True
        try:
            yield
        finally:
            self._lets_through = False

    def _handle(self, number: int, frame: Any) -> None:
        if self._lets_through:
            self._lets_through = False  # the next one must not end what puts things back
            self._known(number, frame)
            self._lets_through = True  # the handler has only noted it
        else:
            self._held.append((number, frame))


class _InReplay:
    """A pattern for the filters of warnings that matches every warning of a replay."""

    def match(self, text: str) -> bool:
        return is_replaying()


_UNWARNED = ("ignore", _InReplay(), Warning, None, 0)


@contextmanager
def _unwarned() -> Iterator[None]:
    """Silences the warnings of a replay, which the training has told already.

    Not those of other threads, and not with ``warnings.catch_warnings()``: entered and left in two
    threads at once, that leaves the filters of one of them for good.
    """
    filters: Any = warnings.filters
    filters.insert(0, _UNWARNED)
    try:
        yield
    finally:
        if _UNWARNED in filters:
            filters.remove(_UNWARNED)


def _refuse(reach: Reach) -> None:
    several = is_distributed() and dist.get_world_size() > 1
    for module in reach.modules:
        name = type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            raise ReplayError(SCRIPTED.format(name=name))
        # By name: to import the classes takes long.
        if not _SHARDING.isdisjoint(one.__name__ for one in type(module).__mro__):
            raise ReplayError(SHARDED)
        if several and isinstance(module, nn.SyncBatchNorm) and module.training:
            raise ReplayError(COMMUNICATES.format(what=name))


def _taken_from(
    reach: Reach, functions: Iterable[Callable[..., Any]], given: Iterable[object]
) -> list[str]:
    """Returns sentences that say what a replay takes other items from than the training did.

    Raises:
        ReplayError: If it would take items from something that cannot be put back.
    """
    found = []
    for drawn, is_put_back in reach.drawn(functions, given):
        if not is_put_back:
            raise ReplayError(CANNOT_PUT_BACK.format(drawn=drawn))
        found.append(TAKES.format(drawn=drawn))
    return list(dict.fromkeys(found))


@contextmanager
def _environment() -> Iterator[None]:
    """Puts back the environment variables."""
    before = dict(os.environ)
    try:
        yield
    finally:
        now = dict(os.environ)
        for name in now.keys() - before.keys():
            del os.environ[name]
        os.environ.update({name: one for name, one in before.items() if now.get(name) != one})


def _unwrap(modules: Iterable[nn.Module]) -> None:
    """Makes wrappers do nothing but call what they wrap; attributes, so they are put back."""
    for module in modules:
        inside = vars(module)
        if isinstance(module, (DistributedDataParallel, DataParallel)):
            # Not a function of ours, which would be on the stack between the user's lines.
            inside["forward"] = module.module.__call__
        elif wraps(module, "_orig_mod"):
            inside["forward"] = unwrapped(module).__call__
        if inside.get("_compiled_call_impl") is not None:
            inside["_compiled_call_impl"] = None


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Runs compiled functions that were not found uncompiled, from torch 2.6 on."""
    set_stance = getattr(torch.compiler, "set_stance", None)
    # Importing the compiler takes long. If nobody has imported it, nothing is compiled.
    if set_stance is None or "torch._dynamo" not in sys.modules:
        yield
        return
    with set_stance("force_eager"):
        yield


@contextmanager
def _without_cached_weights(modules: Collection[int]) -> Iterator[None]:
    """Hides what ``torch.nn.utils.parametrize.cached()`` has computed of the real weights.

    ``modules`` are the ``id()`` of those whose weights are replaced; the cache is that of all.
    """
    cache: dict[Any, Any] = getattr(sys.modules.get("torch.nn.utils.parametrize"), "_cache", {})
    before = _taken(cache, modules)
    try:
        yield
    finally:
        _taken(cache, modules)
        cache.update(before)


def _taken(cache: dict[Any, Any], modules: Collection[int]) -> dict[Any, Any]:
    return {key: cache.pop(key) for key in list(cache) if key[0] in modules}


@contextmanager
def without_gradients(leaves: Iterable[Tensor], hooks: bool = False) -> Iterator[None]:
    """Takes ``.grad`` from leaf tensors for a block; they get the very same tensors back.

    ``hooks`` says whether their hooks are taken as well.
    """
    kinds = ("grad", "_backward_hooks", "_post_accumulate_grad_hooks")[: 3 if hooks else 1]
    saved = [
        (leaf, kind, getattr(leaf, kind))
        for leaf in leaves
        if leaf.requires_grad and leaf.is_leaf
        for kind in kinds
    ]
    try:
        for leaf, kind, value in saved:
            if value is not None:
                setattr(leaf, kind, None)
        yield
    finally:
        for leaf, kind, value in saved:
            if getattr(leaf, kind) is not value:
                setattr(leaf, kind, value)


@contextmanager
def _no_steps() -> Iterator[None]:
    """Refuses steps of optimizers in a replay, before any other hook is told of one."""
    handle = register_optimizer_step_pre_hook(_refuse_step)
    # The dict is private; without a place at its front a watcher would count the step.
    _global_optimizer_pre_hooks.move_to_end(handle.id, last=False)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        handle.remove()


def _refuse_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if is_replaying():
        raise ReplayError(STEPS)


class _NoCollectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses to communicate: other ranks do not take part in a replay."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            raise ReplayError(COMMUNICATES.format(what="The forward"))
        return func(*args, **(kwargs or {}))

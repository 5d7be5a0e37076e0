"""Arrivals: which parameters received a gradient in a backward, in what order, and when it ended.

The hook of a parameter is ``operator.setitem`` bound to a dict, so that an arrival costs no Python
frame at all; the insertion order of the dict is the backward order. Only the first arrival of a
backward must run Python, to ask the autograd engine for a callback at its end: between backwards
the dict has a class whose ``__setitem__`` is written in Python, and swaps it for dict's own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import setitem
from types import FrameType, MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import _engine_run_backward
from torch.utils.hooks import RemovableHandle

# The private door to the end of a backward, which DDP and FSDP2 of torch 2.4 to 2.13 use as well.
# A hook on the root of the graph would run at its beginning, and no public hook runs at its end.
_queue_callback = torch.autograd.Variable._execution_engine.queue_callback

# Frames of these functions on the call stack show that a backward is under way further out; the
# engine itself does not say so (torch 2.4 to 2.13).
_ENGINE_CODE = _engine_run_backward.__code__
_FUNCTION_CODE = BackwardCFunction.apply.__code__


class Backward(NamedTuple):
    """A backward that has ended.

    Attributes:
        arrived: Indices of the parameters that received a gradient, in backward order; none where
            FSDP2 keeps the gradients to itself until the last micro-batch.
        continues: Whether it belongs to the micro-batch of the backward before it: a backward
            inside another one, as reentrant checkpointing runs it, may end by itself.
        create_graph: Whether it recorded a graph of itself; gradients are then added up into new
            tensors, not in place.
        freed: Norms by index of gradients that are gone already, used up inside the backward.
    """

    arrived: Sequence[int]
    continues: bool
    create_graph: bool
    freed: Mapping[int, Tensor] = MappingProxyType({})


class Arrivals(dict[int, Tensor]):
    """The parameters that arrived in the backward under way: index -> tensor, in backward order.

    It holds parameters, never gradients: a reference to a gradient would keep it alive.
    """

    __slots__ = ("_handles", "_on_arrived", "_on_end", "_open", "_open_task", "_token")

    def __init__(
        self,
        on_end: Callable[[Backward], None],
        on_arrived: Callable[[], None] | None = None,
    ) -> None:
        """Starts with no parameter hooked.

        Args:
            on_end: Called at the end of each backward: every ``.grad`` is final then, and no code
                of the user has run yet.
            on_arrived: Called before it, when every gradient has arrived and none has been reduced
                over ranks yet; None where nobody listens.
        """
        super().__init__()
        self._handles: dict[int, RemovableHandle] = {}
        self._on_arrived = on_arrived
        self._on_end = on_end
        self._open: set[int] = set()
        self._open_task = -1
        self._token = 0
        self._arm()

    def hook(self, index: int, tensor: Tensor) -> None:
        """Hangs the arrival mark on a leaf tensor that requires a gradient, once.

        Args:
            index: What the tensor is called in the report at the end of the backward.
            tensor: The tensor.
        """
        if index not in self._handles:
            self._handles[index] = on_accumulated(tensor, partial(setitem, self, index))

    def hooked(self, index: int) -> bool:
        """Tells whether the tensor with this index carries the mark."""
        return index in self._handles

    def hooked_indices(self) -> list[int]:
        """Lists the indices of the tensors that carry the mark."""
        return list(self._handles)

    def unhook(self) -> None:
        """Removes every mark; safe to call again."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._arm()

    def begin(self) -> None:
        """Begins a backward before its first arrival, unless one is under way."""
        if self.__class__ is Arrivals:
            return
        self.__class__ = Arrivals
        end = _BackwardEnd(self, self._token)
        # DDP and FSDP2 finish their reduction in callbacks that were queued as this one is. One
        # that is queued from inside a callback runs after all of them, when every gradient is
        # final. Where nobody listens in between, no Python frame is needed for that.
        again = partial(_queue_callback, end)
        _queue_callback(again if self._on_arrived is None else end.all_arrived)

    def _arm(self) -> None:
        self.clear()
        # A callback that is queued already cannot be taken back; its token is out of date now.
        self._token += 1
        self.__class__ = _ArmedArrivals

    def _continues(self, arrived: Sequence[int], task: int, nested: bool) -> bool:
        """Decides whether a backward that ended belongs to the micro-batch of the one before."""
        # Reentrant checkpointing runs a backward inside the backward for each block, and each ends
        # by itself. An outer one has a lower task number than the nested ones that ended before
        # it. Two nested ones share the outer one unless a parameter arrives again.
        same = task < self._open_task or (nested and self._open.isdisjoint(arrived))
        continues = bool(self._open) and same
        before = self._open if continues else set()
        self._open = before.union(arrived) if nested else set()
        self._open_task = task
        return continues


class _ArmedArrivals(Arrivals):
    """Arrivals between two backwards: the first mark begins a backward."""

    __slots__ = ()

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        # FSDP2 calls the mark where a reduction is made up for, as well: outside of a backward.
        if torch._C._current_graph_task_id() != -1:  # inside_backward() without its frame
            self.begin()
            self[index] = tensor


class _BackwardEnd:
    """The callback at the end of a backward."""

    __slots__ = ("_arrivals", "_finished", "create_graph", "nested", "task", "token")

    def __init__(self, arrivals: Arrivals, token: int) -> None:
        self._arrivals = arrivals
        self._finished = False
        self.token = token
        self.task: int = torch._C._current_graph_task_id()
        self.nested = _inside_another_backward(sys._getframe())
        # The engine sets the grad mode of a backward to create_graph.
        self.create_graph = torch.is_grad_enabled()

    def all_arrived(self) -> None:
        if self._arrivals._on_arrived is not None:
            self._arrivals._on_arrived()
        _queue_callback(self)

    def __call__(self) -> None:
        self._finished = True
        arrivals = self._arrivals
        if self.token != arrivals._token:
            return  # the hooks were taken off, or hung anew, in between
        arrived = list(arrivals)
        arrivals._arm()  # before the report: a listener may run a backward of its own
        continues = False
        if self.nested or arrivals._open:
            continues = arrivals._continues(arrived, self.task, self.nested)
        arrivals._on_end(Backward(arrived, continues, self.create_graph))

    def __del__(self) -> None:
        # A backward that fails runs no callback: the engine drops this object, and nothing else
        # tells that what has arrived so far is void.
        if not self._finished and self.token == self._arrivals._token:
            self._arrivals._arm()


def _inside_another_backward(frame: FrameType | None) -> bool:
    """Tells from the call stack whether a backward was started by a backward."""
    entered = False
    while frame is not None:
        if frame.f_code is _ENGINE_CODE:
            if entered:
                return True
            entered = True
        elif entered and frame.f_code is _FUNCTION_CODE:
            return True
        frame = frame.f_back
    return False


def on_incoming(tensor: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Has a hook called with a gradient that reaches a tensor, before it is added to ``.grad``."""
    # torch leaves this method without annotations, and the next one.
    handle: RemovableHandle = tensor.register_hook(hook)  # type: ignore[no-untyped-call]
    return handle


def on_accumulated(tensor: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Has a hook called with a leaf tensor in each backward, as soon as its gradient is there.

    Under data parallelism the gradient is not yet reduced then.
    """
    handle: RemovableHandle = tensor.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    return handle


def inside_backward() -> bool:
    """Tells whether this code runs inside a backward: in a hook, or in a function of its graph."""
    # Private; no public function says it (torch 2.4 to 2.13). It is -1 outside.
    return bool(torch._C._current_graph_task_id() != -1)


def is_watched(tensor: Tensor) -> bool:
    """Tells whether a tensor carries an arrival mark of some watcher that is attached to it."""
    # The tensor itself is asked, no list of ours: a copy of a watched model has no hooks.
    hooks: dict[int, Any] = getattr(tensor, "_post_accumulate_grad_hooks", None) or {}
    return any(isinstance(h, partial) and isinstance(h.args[0], Arrivals) for h in hooks.values())

"""Arrivals: which parameters received a gradient in a backward, in what order, and when it ended.

The hook of each parameter is ``operator.setitem`` bound to a dict, so that an arrival runs no
Python frame at all, and the insertion order of the dict is the backward order. Only the first
arrival of a backward must run Python code, to queue a callback at the end of the backward. So
between backwards the dict is of a subclass whose ``__setitem__`` is written in Python; its first
call switches the dict back to the class with dict's own ``__setitem__``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from operator import setitem
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from gradwatch.hooks.callers import inside_another_backward
from gradwatch.hooks.graph import Graph, graph_under_way

# Private, but DDP and FSDP2 of torch 2.4 to 2.13 use it as well. No public hook runs at the end of
# a backward; a hook on the root of the graph would run at its beginning.
_queue_callback = torch.autograd.Variable._execution_engine.queue_callback


class Backward(NamedTuple):
    """A backward that has ended.

    Attributes:
        arrived: Indices of the parameters that received a gradient, in backward order; empty if
            FSDP2 keeps the gradients back until the last micro-batch.
        continues: Whether it belongs to the same micro-batch as the backward before it. Reentrant
            checkpointing runs backwards inside another one, and each of them ends on its own.
        create_graph: Whether it recorded a graph of itself (``create_graph=True``). Gradients are
            then accumulated into new tensors, not in place.
        freed: Norms ``[]``, by index, of gradients that an optimizer has used and freed inside the
            backward.
        number: Which micro-batch of the run it belongs to. Windows of several optimizers that hold
            the same number hold gradients of the same loss.
        graph: What its graph looks like; None unless :attr:`Arrivals.describes` asks for it.
    """

    arrived: Sequence[int]
    continues: bool
    create_graph: bool
    freed: Mapping[int, Tensor] = MappingProxyType({})
    number: int = 0
    graph: Graph | None = None


# A function without a Python frame. Not None: Dynamo, if it traces the hook as a part of a compiled
# step, would not notice that it must be asked for again.
NOT_NEEDED: Callable[[int], object] = bool


class Arrivals(dict[int, Tensor]):
    """The parameters that received a gradient in the current backward, by index, in its order.

    It maps each index to the parameter, never to the gradient: a reference to a gradient would
    keep it in memory.

    Attributes:
        ended: The number of micro-batches whose backward has ended.
        on_begin: Called at the first arrival of a backward with the index of that parameter, when
            all other gradients still are what they were before the backward; :data:`NOT_NEEDED` if
            nobody wants to know.
        describes: Whether to look at the graph of each backward, which takes a while.
    """

    __slots__ = (
        *("_handles", "_on_arrived", "_on_end", "_open", "_open_task", "_token"),
        *("describes", "ended", "on_begin"),
    )

    def __init__(
        self,
        on_end: Callable[[Backward], None],
        on_arrived: Callable[[], None] | None = None,
    ) -> None:
        """Starts with no parameter hooked.

        torch's C++ holds the hooks, and so whatever they lead to for as long as the parameters
        live: no function that is given may refer to the parameters, other than weakly.

        Args:
            on_end: Called at the end of each backward, when every ``.grad`` is final and before
                any code of the user runs.
            on_arrived: Called before ``on_end``, when every gradient has arrived but before the
                end-of-backward reduction over ranks; None if it is not needed.
        """
        super().__init__()
        self._handles: dict[int, RemovableHandle] = {}
        self._on_arrived = on_arrived
        self._on_end = on_end
        self.ended = 0
        self.describes = False
        self.on_begin: Callable[[int], object] = NOT_NEEDED
        self._open: set[int] = set()
        self._open_task = -1
        self._token = 0
        self._arm()

    def hook(self, index: int, tensor: Tensor) -> None:
        """Registers the arrival hook on a leaf tensor that requires a gradient, once.

        ``index`` stands for the tensor in :attr:`Backward.arrived`.
        """
        if index not in self._handles:
            self._handles[index] = on_accumulated(tensor, partial(setitem, self, index))

    def unhook_one(self, index: int) -> bool:
        """Removes the arrival hook of a tensor; returns whether it had one."""
        handle = self._handles.pop(index, None)
        if handle is not None:
            handle.remove()
        return handle is not None

    def hooked(self, index: int) -> bool:
        """Returns whether the tensor with this index has an arrival hook."""
        return index in self._handles

    def hooked_indices(self) -> list[int]:
        """Lists the indices of the tensors that have an arrival hook."""
        return list(self._handles)

    def unhook(self) -> None:
        """Removes every arrival hook; safe to call again."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._arm()

    @property
    def under_way(self) -> bool:
        """Whether a backward has begun and not ended yet."""
        return self.__class__ is Arrivals

    def call_when_arrived(self, on_arrived: Callable[[], None]) -> None:
        """Calls ``on_arrived`` in later backwards, as if it had been given from the start."""
        self._on_arrived = on_arrived

    def begin(self) -> None:
        """Begins a backward, before its first arrival; does nothing if one is under way."""
        if self.__class__ is Arrivals:
            return
        self.__class__ = Arrivals
        end = _BackwardEnd(self, self._token)
        # DDP and FSDP2 finish their reduction in callbacks that are queued in the same way. A
        # callback that is queued from inside a callback runs after all of those, when every
        # gradient is final. Without an on_arrived, a partial does this with no Python frame.
        again = partial(_queue_callback, end)
        _queue_callback(again if self._on_arrived is None else end.all_arrived)

    def _arm(self) -> None:
        self.clear()
        # A callback that is already queued cannot be canceled. A new token makes it do nothing.
        self._token += 1
        self.__class__ = _ArmedArrivals

    def _continues(self, arrived: Sequence[int], task: int, nested: bool) -> bool:
        """Decides whether a backward that ended belongs to the micro-batch of the one before."""
        # Reentrant checkpointing runs a nested backward for each block, and each of them ends on
        # its own. The outer backward ends last, with a lower task number than the nested ones.
        # Two nested backwards belong to the same outer one unless a parameter arrives again.
        same = task < self._open_task or (nested and self._open.isdisjoint(arrived))
        continues = bool(self._open) and same
        before = self._open if continues else set()
        self._open = before.union(arrived) if nested else set()
        self._open_task = task
        return continues


class _ArmedArrivals(Arrivals):
    """Arrivals between two backwards: the first arrival begins a backward."""

    __slots__ = ()

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        # FSDP2 calls the hook outside of a backward, too, when held-back gradients are reduced.
        if torch._C._current_graph_task_id() != -1:  # inside_backward() without its frame
            self.on_begin(index)
            self.begin()
            self[index] = tensor


class _BackwardEnd:
    """The callback at the end of a backward."""

    __slots__ = ("_arrivals", "_finished", "create_graph", "graph", "nested", "task", "token")

    def __init__(self, arrivals: Arrivals, token: int) -> None:
        self._arrivals = arrivals
        self._finished = False
        self.token = token
        self.task: int = torch._C._current_graph_task_id()
        self.nested = inside_another_backward(sys._getframe())
        # The engine sets the grad mode of a backward to create_graph.
        self.create_graph = torch.is_grad_enabled()
        looks = arrivals.describes and not self.nested
        self.graph = graph_under_way() if looks else None

    def all_arrived(self) -> None:
        if self._arrivals._on_arrived is not None:
            self._arrivals._on_arrived()
        _queue_callback(self)

    def __call__(self) -> None:
        self._finished = True
        arrivals = self._arrivals
        if self.token != arrivals._token:
            return  # the hooks were removed, or registered anew, in the meantime
        arrived = list(arrivals)
        arrivals._arm()  # before on_end: what it calls may run a backward of its own
        continues = False
        if self.nested or arrivals._open:
            continues = arrivals._continues(arrived, self.task, self.nested)
        arrivals.ended += not continues
        number, graph = arrivals.ended, self.graph
        arrivals._on_end(
            Backward(arrived, continues, self.create_graph, number=number, graph=graph)
        )

    def __del__(self) -> None:
        # A backward that raises runs no callback: the engine only drops this object. Nothing else
        # shows that the arrivals so far do not count.
        if not self._finished and self.token == self._arrivals._token:
            self._arrivals._arm()


def on_incoming(tensor: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Registers a hook on a tensor's incoming gradient, before it is added to ``.grad``."""
    # torch has no annotations for this method, nor for the next one.
    handle: RemovableHandle = tensor.register_hook(hook)  # type: ignore[no-untyped-call]
    return handle


def on_accumulated(tensor: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Registers a hook that is called with a leaf tensor once its ``.grad`` is accumulated.

    Under data parallelism the gradient is not yet reduced at this point.
    """
    handle: RemovableHandle = tensor.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    return handle


def inside_backward() -> bool:
    """Returns whether this code runs inside a backward: in a hook, or a function of its graph."""
    # Private, as there is no public function for it (torch 2.4 to 2.13). It is -1 outside.
    return bool(torch._C._current_graph_task_id() != -1)


class FirstBackward:
    """Notices the first backward of a model that nobody watches; removes its hooks then."""

    MOST_HOOKS = 16  # spread over the model, of which a backward may reach a part only

    def __init__(self, tensors: Sequence[Tensor], call: Callable[[], None]) -> None:
        """Registers the hooks on some of the tensors that require a gradient.

        ``call`` must not refer to the watcher: the hooks stay if it is dropped.
        """
        self._call = call
        hooked = [tensor for tensor in tensors if tensor.requires_grad]
        stride = 1 + len(hooked) // self.MOST_HOOKS
        self._handles = [on_accumulated(one, self._see) for one in hooked[::stride]]

    def remove(self) -> None:
        """Removes the hooks; safe to call again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _see(self, tensor: Tensor) -> None:
        self.remove()
        self._call()


def expect_no_first(tensors: Iterable[Tensor]) -> None:
    """Removes every :class:`FirstBackward` from the tensors: they are watched from now on."""
    for tensor in tensors:
        hooks: dict[int, Any] = getattr(tensor, "_post_accumulate_grad_hooks", None) or {}
        for hook in list(hooks.values()):
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, FirstBackward):
                owner.remove()


def is_watched(tensor: Tensor) -> bool:
    """Returns whether a tensor has an arrival hook of any attached watcher."""
    # Looked up on the tensor, not in a list of ours: a copy of a watched model has no hooks.
    hooks: dict[int, Any] = getattr(tensor, "_post_accumulate_grad_hooks", None) or {}
    return any(isinstance(h, partial) and isinstance(h.args[0], Arrivals) for h in hooks.values())


_giving_way: list[Callable[[Sequence[Tensor]], None]] = []


def give_way_with(release: Callable[[Sequence[Tensor]], None]) -> None:
    """Has a function called when a user watches tensors: it ends watchers that nobody asked for."""
    _giving_way.append(release)


def give_way_no_more(release: Callable[[Sequence[Tensor]], None]) -> None:
    """Ends :func:`give_way_with`; safe to call again."""
    if release in _giving_way:
        _giving_way.remove(release)


def ask_to_give_way(tensors: Sequence[Tensor]) -> None:
    """Asks the watchers that give way to leave some tensors, which a user is about to watch."""
    for release in _giving_way:
        release(tensors)

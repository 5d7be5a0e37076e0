"""The code that has called what runs now, also where a thread of torch's own runs it.

On an accelerator the hooks of a backward run in a thread that torch keeps for the device. The
frames of the training loop are not on its stack: they are on that of the thread which waits for the
backward to end.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import _engine_run_backward

from gradwatch.hooks.variables import local_variables
from gradwatch.imports import no_collection

MOST_NODES = 4_000
"""Nodes that are looked at, from the loss on: enough to tell two graphs apart."""

ENGINE_CODE = _engine_run_backward.__code__
"""Of the function that runs every backward. Its frame on the stack shows that one is under way."""

# Of the function that runs a node whose backward is written in Python. A backward that is called in
# there, as by reentrant checkpointing, is inside another one. The engine itself does not tell
# (torch 2.4 to 2.13).
_FUNCTION_CODE = BackwardCFunction.apply.__code__


def callers(frame: FrameType) -> Iterator[FrameType]:
    """Yields a frame and those that have called it, from the innermost outwards.

    If a thread of torch's own runs the frame in a backward, those of the thread that has called the
    backward follow, if it is known which one that is.
    """
    outer: FrameType | None = frame
    while outer is not None:
        yield outer
        outer = outer.f_back
    if torch._C._current_graph_task_id() != -1 and _outermost(frame) is not ENGINE_CODE:
        outer = _waiting_frame()
        while outer is not None:
            yield outer
            outer = outer.f_back


def frames_of_threads() -> dict[int, FrameType]:
    """Returns what each thread runs, by its identifier, without a collection of garbage.

    Up to Python 3.11 ``sys._current_frames()`` may collect while it holds the lock of the list of
    threads. A tensor that is freed then lets another thread go on, and one that ends meanwhile, as
    torch's threads do to Python after each hook, waits for that lock: both wait for ever.
    """
    with no_collection():
        return sys._current_frames()


def engine_frame(frame: FrameType) -> FrameType | None:
    """Returns the frame that runs the backward under way, seen from a frame in one of its hooks."""
    return next((one for one in callers(frame) if one.f_code is ENGINE_CODE), None)


def inside_another_backward(frame: FrameType | None) -> bool:
    """Returns whether the backward under way was called inside another one, by the call stack."""
    entered = False
    while frame is not None:
        if frame.f_code is ENGINE_CODE:
            if entered:
                return True
            entered = True
        elif entered and frame.f_code is _FUNCTION_CODE:
            return True
        frame = frame.f_back
    return False


def nodes_of(frame: FrameType) -> list[Any]:
    """Lists the nodes at which the backward of an :func:`engine_frame` begins."""
    losses = local_variables(frame)["t_outputs"]
    losses = (losses,) if isinstance(losses, Tensor) else losses
    # A backward may also begin at a torch.autograd.graph.GradientEdge, which has a node.
    return [one.grad_fn if isinstance(one, Tensor) else one.node for one in losses]


def walk(roots: list[Any], most: int = MOST_NODES) -> Iterator[Any]:
    """Yields the nodes of a graph from its roots on, each once."""
    seen: set[Any] = set()
    rest = roots[::-1]
    while rest and len(seen) < most:
        node = rest.pop()
        if node is not None and node not in seen:
            seen.add(node)
            rest += [child for child, _ in node.next_functions]
            yield node


def _outermost(frame: FrameType | None) -> CodeType | None:
    """Returns the outermost of the functions that enter the engine, or are called by it."""
    found = None
    while frame is not None:
        if frame.f_code is ENGINE_CODE or frame.f_code is _FUNCTION_CODE:
            found = frame.f_code
        frame = frame.f_back
    return found


def _waiting_frame() -> FrameType | None:
    """Returns the frame of another thread that waits for the backward that this one works for."""
    mine = threading.get_ident()
    waiting = []
    for ident, frame in frames_of_threads().items():
        if ident != mine and _outermost(frame) is ENGINE_CODE:
            inner = frame
            while inner.f_code is not ENGINE_CODE and inner.f_back is not None:
                inner = inner.f_back
            waiting.append(inner)
    if len(waiting) > 1:  # several threads train at once
        waiting = [one for one in waiting if _leads_here(one)]
    return waiting[0] if len(waiting) == 1 else None


def _leads_here(frame: FrameType) -> bool:
    """Returns whether the node that this thread runs is of the backward of a frame."""
    node: Any = torch._C._current_autograd_node()  # None in a callback at the end of a backward
    return node is not None and any(one is node for one in walk(nodes_of(frame)))

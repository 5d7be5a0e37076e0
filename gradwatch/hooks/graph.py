"""What the graph of a backward looks like: its nodes, and the data that the forward was given.

Two backwards whose graphs share nodes come from the same forward; two whose first layers have saved
the same tensors come from the same data.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from gradwatch.hooks.callers import engine_frame, nodes_of, walk

_MOST_ELEMENTS = 4_096  # of the data, spread over all of it
_PARAMETER = "torch::autograd::AccumulateGrad"
_SCALED = "MulBackward0"  # a loss is scaled by a product, or by a division: the same thing
_BITS = {torch.bfloat16: torch.int16}  # what NumPy has instead
_NEAR = 3  # nodes between a parameter and the layer that uses it: a transpose, a cast, a view


class Graph(NamedTuple):
    """The graph of one backward, or its first nodes.

    Attributes:
        shape: A hash of the names of the nodes, in the order of a walk from the loss.
        nodes: The sequence numbers of the nodes. Each operation of the forward has its own. Nodes
            through which nothing but a parameter comes in are left out.
        data: Hashes of the tensors that the first layers were given; empty where these cannot be
            read without a wait or a side effect.
        elements: The number of elements of these tensors.
    """

    shape: int
    nodes: frozenset[int]
    data: frozenset[int]
    elements: int


def graph_under_way() -> Graph | None:
    """Describes the graph of the backward that runs; costs some microseconds per node.

    It must be called from a hook of that backward.

    Returns:
        None if the graph cannot be seen: the backward runs inside another one, or torch has
        changed.
    """
    # There is no public way from a hook to the root of the graph. The engine can list the nodes
    # only before the first of them has run. But the frame that has called it has the losses.
    try:
        frame = engine_frame(sys._getframe())
        return None if frame is None else _describe(nodes_of(frame))
    except (AttributeError, KeyError, RuntimeError, TypeError):
        return None


def _describe(roots: list[Any]) -> Graph:
    names: list[str] = []
    numbers: set[int] = set()
    data: dict[int, int] = {}
    for node in walk(roots):
        name = node.name()
        names.append(_SCALED if name == "DivBackward0" else name)
        # Casts of weights are shared by all forwards in one autocast, and say nothing.
        if not _is_parameter(node):
            numbers.add(node._sequence_nr())
        if name != _PARAMETER and _is_first(node):
            data.update(_data_of(node))
    return Graph(hash(tuple(names)), frozenset(numbers), frozenset(data), sum(data.values()))


def _is_first(node: Any) -> bool:
    """Returns whether a node is of a first layer: nothing comes in but parameters and data."""
    return all(child is None or _is_parameter(child) for child, _ in node.next_functions)


def _is_parameter(node: Any) -> bool:
    for _ in range(_NEAR):
        if node.name() == _PARAMETER:
            return True
        inputs = node.next_functions
        # An embedding, say, is a layer: it has saved what it was given.
        if len(inputs) != 1 or inputs[0][0] is None or _saved_by(node.__class__):
            return False
        node = node.next_functions[0][0]
    return bool(node.name() == _PARAMETER)


def _saved_by(kind: Any) -> tuple[str, ...]:
    # A Function of the user's may be defined where a model is, and must not stay in a cache.
    of_user = issubclass(kind, BackwardCFunction)
    return _list_saved_by(kind) if of_user else _known_saved_by(kind)


@lru_cache(maxsize=1_000)
def _known_saved_by(kind: Any) -> tuple[str, ...]:
    return _list_saved_by(kind)


def _list_saved_by(kind: Any) -> tuple[str, ...]:
    prefix = "_raw_saved_"
    return tuple(name.removeprefix(prefix) for name in dir(kind) if name.startswith(prefix))


def _data_of(node: Any) -> Iterator[tuple[int, int]]:
    """Yields a hash and the number of elements of each tensor that a first layer was given."""
    for name in _saved_by(node.__class__):
        if name.startswith("result"):  # what the layer has computed, and its memory for that
            continue
        try:
            # Unpacking runs the hooks of saved tensors, which recompute a checkpointed forward.
            # Without this attribute (before torch 2.6, say) nothing tells whether there are any.
            if getattr(node, f"_raw_saved_{name}").unpack_hook is not None:
                continue
            tensor = getattr(node, f"_saved_{name}")
        except (AttributeError, RuntimeError):
            continue  # saved by nobody, freed already, or written to since
        # A weight, and what was computed from one, requires a gradient.
        if isinstance(tensor, Tensor) and not tensor.requires_grad:
            yield from _hash(tensor)


def _hash(tensor: Tensor) -> Iterator[tuple[int, int]]:
    readable = tensor.is_cpu and tensor.layout is torch.strided
    if not readable or tensor.numel() < 2 or tensor.is_conj() or tensor.is_neg():
        return
    stride = 1 + tensor.numel() // _MOST_ELEMENTS
    try:
        bits = tensor.detach().view(_BITS.get(tensor.dtype, tensor.dtype)).numpy()
    except TypeError:  # a dtype that NumPy does not have
        return
    # A slice or a transposed tensor is not copied for it.
    yield hash((tuple(tensor.shape), bits.flat[::stride].tobytes())), tensor.numel()

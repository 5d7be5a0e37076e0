"""Where the examples of a batch are in the tensors of a graph."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from gradwatch.measure.devices import in_double
from gradwatch.replay.live import BatchSeen

Shape: TypeAlias = tuple[int, ...]


class Placed(NamedTuple):
    """Where the examples are in a tensor: along ``dim`` of the tensor reshaped to ``view``."""

    view: tuple[int, ...]
    dim: int

    def masked(self, gradient: Tensor, mask: Tensor) -> Tensor:
        """Sets all but some examples of a gradient to 0; ``mask`` is bool ``[batch]``."""
        shape = [1] * len(self.view)
        shape[self.dim] = -1
        # where() and not a product: that of an infinite row and 0 would be NaN.
        kept = torch.where(mask.to(gradient.device).view(shape), gradient.reshape(self.view), 0)
        return kept.reshape(gradient.shape)

    def sums(self, values: Tensor) -> Tensor:
        """Adds up the values of each example: ``[batch]``, float64."""
        rows = values.detach().real.reshape(self.view).movedim(self.dim, 0)
        return in_double(rows.reshape(len(rows), -1)).sum(1).cpu()


@dataclass(frozen=True, slots=True)
class Batch:
    """The batch dimension of the input.

    Attributes:
        size: Number of examples; 0 if it is not known.
        dim: Which dimension of the input it is.
        lengths: How many rows of a flattened output may be of one example.
    """

    size: int
    dim: int
    lengths: frozenset[int]

    @classmethod
    def of(cls, shape: tuple[int, ...], seen: Sequence[BatchSeen]) -> Batch:
        """Returns the batch of an input of a shape, given what layers have seen of it."""
        if not shape:
            return cls(0, 0, frozenset())
        dim = 0
        if len(shape) > 1 and len({one.size for one in seen}) == 1:
            # Recurrent and attention layers know which dimension is time: a layer that does not
            # have batch_first may still be given a batch that the model has transposed.
            dim = _dimension_of(seen[0], shape)
        rest = [size for i, size in enumerate(shape) if i != dim]
        lengths = {
            math.prod(rest[i:j]) for i in range(len(rest)) for j in range(i + 1, len(rest) + 1)
        }
        # A language model predicts the next token, of which there is one less.
        lengths |= {rest[0] - 1} if rest else set()
        return cls(shape[dim], dim, frozenset(lengths - {0}))

    def place(self, shape: Sequence[int]) -> Placed | None:
        """Finds the examples in a tensor; None if it does not have the batch dimension."""
        sizes = tuple(shape)
        for dim in (self.dim, 0, 1):
            if dim < len(sizes) and sizes[dim] == self.size:
                return Placed(sizes, dim)
        if not sizes or sizes[0] % self.size or sizes[0] // self.size not in self.lengths:
            return None
        split = (self.size, sizes[0] // self.size)
        if self.dim == 0:
            return Placed((*split, *sizes[1:]), 0)
        return Placed((*split[::-1], *sizes[1:]), 1)


def _dimension_of(batch: BatchSeen, shape: tuple[int, ...]) -> int:
    fits = [dim for dim in (0, 1) if shape[dim] == batch.size]
    if len(fits) == 2:  # as many examples as time steps
        return 0 if batch.outermost else 1
    return fits[0] if fits else 0


class Edge(NamedTuple):
    """An edge of the graph from a tensor without batch dimension to one that has it.

    Attributes:
        node: The node that made the tensor without.
        number: Which of its ``next_functions`` it leads to.
        placed: Where the examples are in the tensor that has it.
    """

    node: Any
    number: int
    placed: Placed


class BatchedEdges:
    """Finds the edges of a graph at which the batch dimension ends."""

    def __init__(
        self, batch: Batch, parameters: Sequence[Tensor], shapes: Mapping[tuple[Any, int], Shape]
    ) -> None:
        """Starts with the shapes of what nodes have made, as :func:`shapes_in` returns them."""
        self._batch = batch
        self._parameters = {tuple(one.shape) for one in parameters}
        self._shapes = shapes

    def below(self, output: Tensor) -> Iterator[Edge]:
        """Goes down from an output without batch dimension to where there still was one."""
        nodes, seen = [output.grad_fn], {output.grad_fn}
        while nodes:
            node = nodes.pop()
            for index, (child, number) in enumerate(getattr(node, "next_functions", ())):
                shape = self._shapes.get((child, number))
                if shape is None:
                    continue
                placed = self._batch.place(shape)
                if placed is not None and not self._is_no_batch(child, shape):
                    yield Edge(node, index, placed)
                elif child not in seen:
                    seen.add(child)
                    nodes.append(child)

    def _is_no_batch(self, node: Any, shape: Shape) -> bool:
        """Whether a tensor may only happen to be as long as the batch."""
        # A penalty on a parameter; and what is below a transpose shows better which dimension is
        # which.
        if (shape in self._parameters and _of_one_leaf(node)) or _is_transpose(node):
            return True
        nodes, seen = [node], {node}
        while nodes:
            one = nodes.pop()
            if self._multiplies_over_batch(one):
                return True
            for child, below in self._tensors_below(one):
                if below == shape and child not in seen:
                    seen.add(child)
                    nodes.append(child)
                elif below != shape and self._reduces_batch(one, below):
                    return True
        return False

    def _reduces_batch(self, node: Any, below: Shape) -> bool:
        placed, dims = self._batch.place(below), getattr(node, "_saved_dim", ())
        if placed is None or placed.view != below:
            return False
        # torch shows -1 as an unsigned number.
        listed = (dims,) if isinstance(dims, int) else tuple(dims)
        signed = [dim - 2**64 if dim >= 2**63 else dim for dim in listed]
        return placed.dim in [dim % len(below) for dim in signed]

    def _multiplies_over_batch(self, node: Any) -> bool:
        """Whether a node is a product over examples of two matrices, of which none is a weight."""
        factors = self._tensors_below(node)[-2:]
        if len(factors) < 2 or not re.search(r"[Mm]mBackward", node.name()):
            return False
        is_summed = factors[1][1][-2:-1] == (self._batch.size,)
        return is_summed and not any(_of_one_leaf(child) for child, _ in factors)

    def _tensors_below(self, node: Any) -> list[tuple[Any, Shape]]:
        found = ((child, self._shapes.get((child, n))) for child, n in node.next_functions)
        return [(child, shape) for child, shape in found if shape is not None]


def shapes_in(
    outputs: Sequence[Tensor], backward: Callable[[], object]
) -> dict[tuple[Any, int], Shape]:
    """Returns the shapes of the tensors in a graph that a backward reaches.

    Args:
        outputs: From where it starts.
        backward: Runs it, and keeps the graph.

    Returns:
        The shape of each tensor, by the node that made it and which of the node's results it is.
    """
    shapes: dict[tuple[Any, int], Shape] = {}

    def note(node: Any) -> Callable[[Sequence[Tensor | None]], None]:
        # A gradient has the shape of the tensor that it is of.
        return lambda gradients: shapes.update(
            {(node, i): tuple(g.shape) for i, g in enumerate(gradients) if g is not None}
        )

    nodes = _nodes_below([one.grad_fn for one in outputs if one.grad_fn is not None])
    handles = [one.register_prehook(note(one)) for one in nodes if not hasattr(one, "variable")]
    try:
        backward()
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _is_transpose(node: Any) -> bool:
    return re.match(r"(T|Transpose|Permute|Movedim)Backward", node.name()) is not None


def _of_one_leaf(node: Any) -> bool:
    return sum(hasattr(one, "variable") for one in _nodes_below([node])) == 1


def _nodes_below(roots: Sequence[Any]) -> set[Any]:
    nodes, seen = list(roots), set(roots)
    while nodes:
        for child, _ in nodes.pop().next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                nodes.append(child)
    return seen

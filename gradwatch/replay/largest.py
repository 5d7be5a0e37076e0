"""The parameters and the examples with the largest share in a gradient that is too large."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradwatch.measure.devices import in_double
from gradwatch.measure.norms import norm_of_norms
from gradwatch.record.explanation import Share
from gradwatch.replay.batches import Batch, BatchedEdges, Edge, Placed, shapes_in
from gradwatch.replay.live import LiveGraph

MOST = 3
"""How many parameters and examples are named."""
SEARCH = 24
"""The most backwards that a search for the largest examples takes."""
_TOLERANCE = 0.05
"""By how much shares may miss 1 in all; those of float16 and bfloat16 are rounded that much."""

NO_BATCH = (
    "The examples are not told apart: the first input has no batch dimension that the outputs have."
)
NOT_LINEAR = (
    "The examples are not told apart: the backward of one example alone is no part of the whole "
    "one. A hook or a custom autograd Function changes gradients by what they are."
)
NOT_RUN = "The examples are not told apart, as they could not be run again: {error}"
NOT_FINITE = "The examples are not told apart: the gradients of the replay are not finite."
NO_GRADIENT = "The examples are not told apart: the gradients of the replay are zero."
OTHER_GRADIENTS = (
    "The examples are not told apart: run again, the micro-batches do not give the gradients of "
    "the step."
)
SHARDED = "The examples are not told apart: the parameters are sharded over ranks."
SHARED_PART = "{share:.0%} of the gradient belong to no example, such as a penalty on the weights."
OTHER_DIMENSION = "The examples are counted along dimension {dim} of the first input."
FEWER = "In a search of {count} backwards no further example has stood out."
LARGEST_OF_MANY = (
    "Micro-batch {index} of {count} has the gradient with the largest norm; the shares of the "
    "examples are those in it."
)
ONE_OF_MANY = (
    "Micro-batch {index} of {count} has {share:.0%} of the gradient; the shares of the examples "
    "are those in its own gradient."
)


class Examples(NamedTuple):
    """The examples of one micro-batch with the largest share.

    Attributes:
        shares: Largest first; empty if they cannot be told.
        notes: What must be known about them: sentences.
    """

    shares: tuple[Share, ...] = ()
    notes: tuple[str, ...] = ()


class Largest(NamedTuple):
    """The examples of a window with the largest share.

    Attributes:
        micro_batch: The micro-batch that they are of, counted from 1; 0 if it is not known.
        shares: Largest first; empty if they cannot be told.
        notes: What must be known about them: sentences.
    """

    micro_batch: int = 0
    shares: tuple[Share, ...] = ()
    notes: tuple[str, ...] = ()


def largest_parameters(gradients: Mapping[str, Tensor], scale: float = 1.0) -> tuple[Share, ...]:
    """Names the parameters with the largest part of the squared norm.

    Args:
        gradients: The gradient of each parameter, whole: any dtypes, dense or sparse.
        scale: The loss scale by which they are still multiplied.

    Returns:
        At most :data:`MOST` parameters, largest first, the norms in true units. None if a gradient
        is not finite or all are zero.
    """
    # One at a time: no more than one copy in double precision is in memory.
    return largest_by_norm({name: _norm(one) / scale for name, one in gradients.items()})


def largest_by_norm(norms: Mapping[str, float]) -> tuple[Share, ...]:
    """Names the parameters with the largest part of the squared norm, given their norms.

    Args:
        norms: The L2 norm of each gradient, in true units.

    Returns:
        As :func:`largest_parameters`.
    """
    largest = max(norms.values(), default=0.0)
    if largest == 0.0 or not all(map(math.isfinite, norms.values())):
        return ()
    # Relative to the largest one, so that no square overflows or underflows.
    squares = {name: (norm / largest) ** 2 for name, norm in norms.items()}
    total = math.fsum(squares.values())
    ordered = sorted(squares, key=lambda name: -squares[name])[:MOST]
    return tuple(
        Share(name, norms[name], squares[name] / total) for name in ordered if norms[name] > 0.0
    )


def largest_of_window(
    graphs: Sequence[Callable[[], AbstractContextManager[LiveGraph]]],
    gradients: Mapping[str, Tensor],
    scale: float = 1.0,
) -> Largest:
    """Names the examples with the largest share in the micro-batch with the largest share.

    Args:
        graphs: Each runs one micro-batch of the window again. With several of them each is run
            once, and one of them twice.
        gradients: The gradients of the whole window, by the name of the parameter.
        scale: The loss scale by which the gradients of a micro-batch are multiplied.

    Returns:
        The examples. An error of torch ends as a note.
    """
    if any(hasattr(one, "full_tensor") for one in gradients.values()):
        return Largest(notes=(SHARDED,))
    chosen, notes = 0, []
    try:
        if len(graphs) > 1:
            chosen, note = _largest_micro_batch(graphs, gradients)
            notes.append(note)
        with graphs[chosen]() as graph:
            found = largest_examples(graph, scale)
    except _CannotTellError as error:
        return Largest(notes=(str(error),))
    except Exception as error:  # also of what the model does in the backward
        return Largest(notes=(NOT_RUN.format(error=_first_line(error)),))
    return Largest(chosen + 1, found.shares, (*notes, *found.notes))


def _largest_micro_batch(
    graphs: Sequence[Callable[[], AbstractContextManager[LiveGraph]]],
    gradients: Mapping[str, Tensor],
) -> tuple[int, str]:
    """Returns the index of the micro-batch with the largest part of a gradient, and a note."""
    # A loop's own clip of an infinite norm has left NaN or zeros of the gradients.
    is_whole = 0.0 < _total(list(gradients.values())) < math.inf
    parts = [_part(graph, gradients if is_whole else None) for graph in graphs]
    total = math.fsum(parts) if all(map(math.isfinite, parts)) else 0.0
    if total <= 0.0:
        raise _CannotTellError(OTHER_GRADIENTS)
    chosen = parts.index(max(parts))
    known = {"index": chosen + 1, "count": len(parts)}
    if not is_whole:
        return chosen, LARGEST_OF_MANY.format(**known)
    return chosen, ONE_OF_MANY.format(**known, share=parts[chosen] / total)


def _part(
    make: Callable[[], AbstractContextManager[LiveGraph]], gradients: Mapping[str, Tensor] | None
) -> float:
    """Returns how far the gradient of one micro-batch goes along the whole one, or its norm."""
    with make() as graph:
        names = [name for name in graph.parameters if gradients is None or name in gradients]
        leaves = [graph.parameters[name] for name in names]
        own = _Backward(graph.outputs, graph.gradients, leaves, {}, [])()
        if gradients is None:
            return _total(own)
        whole = [gradients[name] for name in names]
        return _inner(own, whole, _total(whole))


def largest_examples(graph: LiveGraph, scale: float = 1.0) -> Examples:
    """Names the examples with the largest share in the gradient of one micro-batch.

    A backward is linear in the gradient that it starts from, also through batch normalization. With
    all but the rows of example ``i`` set to 0 there it gives that example's part ``g_i`` of the
    gradient ``g``, and its share is ``<g_i, g> / <g, g>``. The derivative of ``<g, g>`` by a weight
    on each row gives the shares of all examples at once; where a model cannot be differentiated
    twice, they are searched for by halves, since the shares of several examples add up.

    Where an output has no batch dimension, as a loss that is made inside of the module, the rows
    are those of the tensors that it was reduced from.

    Args:
        graph: The forward, run again. Its graph is still alive afterwards.
        scale: The loss scale by which the gradients are multiplied.

    Returns:
        At most :data:`MOST` examples, largest first. An error of torch ends as a note.
    """
    if any(hasattr(one, "full_tensor") for one in graph.parameters.values()):
        return Examples(notes=(SHARDED,))
    batch = Batch.of(graph.input_shape, graph.batches)
    if batch.size == 0:
        return Examples(notes=(NO_BATCH,))
    try:
        with torch.enable_grad():
            return _largest_examples(graph, batch, scale)
    except Exception as error:  # also of what the model does in the backward
        return Examples(notes=(NOT_RUN.format(error=_first_line(error)),))


def _largest_examples(graph: LiveGraph, batch: Batch, scale: float) -> Examples:
    placed = {i: at for i, one in enumerate(graph.outputs) if (at := batch.place(one.shape))}
    parameters = list(graph.parameters.values())
    others = [one for i, one in enumerate(graph.outputs) if i not in placed]
    inner: list[Edge] = []
    if others:
        plain = _Backward(graph.outputs, graph.gradients, parameters, {}, [])
        edges = BatchedEdges(batch, parameters, shapes_in(others, plain))
        inner = [edge for output in others for edge in edges.below(output)]
    if not placed and not inner:
        return Examples(notes=(NO_BATCH,))
    backward = _Backward(graph.outputs, graph.gradients, parameters, placed, inner)
    with backward.hooked():
        try:
            parts = _Parts(backward, batch.size, has_shared=bool(others))
            found = parts.by_derivative() or parts.by_search()
        except _CannotTellError as error:
            return Examples(notes=(str(error),))
    shares = tuple(Share(str(i), norm / scale, share) for i, norm, share in found)
    notes = []
    if batch.dim:
        notes.append(OTHER_DIMENSION.format(dim=batch.dim))
    if abs(parts.shared) > 0.01:
        notes.append(SHARED_PART.format(share=parts.shared))
    if len(shares) < min(MOST, batch.size):
        notes.append(FEWER.format(count=SEARCH))
    return Examples(shares, tuple(notes))


class _CannotTellError(Exception):
    """The examples cannot be told apart; the message is a note."""


class _Backward:
    """Runs backwards through one graph, from all rows of its outputs or from some of them.

    Attributes:
        weights: With ``twice``, the weight on each gradient that has a batch dimension: ones.
    """

    def __init__(
        self,
        outputs: Sequence[Tensor],
        gradients: Sequence[Tensor],
        parameters: Sequence[Tensor],
        placed: Mapping[int, Placed],
        edges: Sequence[Edge],
    ) -> None:
        self._outputs = outputs
        self._gradients = gradients
        self._parameters = parameters
        self._placed = placed
        self._edges = edges
        self._mask: Tensor | None = None
        self._twice = False
        self._into_leaves = False
        self.weights: list[tuple[Placed, Tensor]] = []

    def __call__(self, mask: Tensor | None = None, twice: bool = False) -> list[Tensor | None]:
        """Returns the gradient of each parameter; with ``mask`` ``[batch]`` of the examples in it.

        What has no batch dimension is part of each of them.
        """
        self._mask, self._twice, self.weights = mask, twice, []
        starts = [
            self._weighted(gradient, self._placed[i]) if i in self._placed else gradient
            for i, gradient in enumerate(self._gradients)
        ]
        if not self._into_leaves:
            try:
                return list(
                    torch.autograd.grad(
                        self._outputs,
                        self._parameters,
                        starts,
                        retain_graph=True,
                        create_graph=twice,
                        allow_unused=True,
                    )
                )
            except RuntimeError:
                # A reentrant checkpoint allows backward() alone.
                self._into_leaves = True
        if twice:
            raise RuntimeError("a reentrant checkpoint cannot be differentiated twice")
        return self._through_leaves(starts)

    def _through_leaves(self, starts: Sequence[Tensor]) -> list[Tensor | None]:
        try:
            for one in self._parameters:
                one.grad = None
            torch.autograd.backward(self._outputs, starts, retain_graph=True)
            return [one.grad for one in self._parameters]
        finally:
            for one in self._parameters:
                one.grad = None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Masks gradients inside of the graph too, where an output has no batch dimension."""
        edges: dict[Any, dict[int, Placed]] = {}
        for node, number, placed in self._edges:
            edges.setdefault(node, {})[number] = placed
        handles = [node.register_hook(self._hook(at)) for node, at in edges.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, at: Mapping[int, Placed]) -> Callable[[Any, Any], tuple[Tensor | None, ...]]:
        def hook(gradients: Any, _: Any) -> tuple[Tensor | None, ...]:
            return tuple(
                self._weighted(one, at[i]) if i in at and one is not None else one
                for i, one in enumerate(gradients)
            )

        return hook

    def _weighted(self, gradient: Tensor, placed: Placed) -> Tensor:
        if self._mask is not None:
            return placed.masked(gradient, self._mask)
        if not self._twice:
            return gradient
        weight = torch.ones_like(gradient, requires_grad=True)
        self.weights.append((placed, weight))
        return gradient * weight


_Found = tuple[int, float, float]
"""Index of an example, norm of its gradient, its share."""


class _Parts:
    """The parts that examples have in one gradient.

    Attributes:
        shared: The share of what has no batch dimension.
    """

    def __init__(self, backward: _Backward, size: int, has_shared: bool) -> None:
        self._backward = backward
        self._size = size
        try:
            self._whole, self._twice = backward(twice=True), True
        except RuntimeError:
            self._whole, self._twice = backward(), False
        self._direction: list[Tensor | None] = [
            None if one is None else one.detach() for one in self._whole
        ]
        self._norm = _total(self._direction)
        if not math.isfinite(self._norm):
            raise _CannotTellError(NOT_FINITE)
        if self._norm == 0.0:
            raise _CannotTellError(NO_GRADIENT)
        self._weights = backward.weights
        self._shared: list[Tensor | None] | None = None
        self.shared = 0.0
        if has_shared:
            self._shared = backward(torch.zeros(size, dtype=torch.bool, device="cpu"))
            self.shared = self._share(self._shared)

    def by_derivative(self) -> list[_Found]:
        """Returns the largest examples by a derivative of the backward; none if it has none."""
        if not self._twice:
            return []
        try:
            shares = self._derivative()
        except RuntimeError:
            return []
        finally:
            self._whole, self._weights = [], []  # the graph of the backward is large
        if not _adds_up([*shares, self.shared]):
            return []
        order = sorted(range(self._size), key=lambda i: -shares[i])[:MOST]
        found = [self._measured(i) for i in order]
        # The derivative of a custom Function's backward may be anything: what one example's own
        # backward says decides.
        if any(abs(share - shares[i]) > _TOLERANCE * max(1.0, abs(share)) for i, _, share in found):
            return []
        return sorted(found, key=lambda one: -one[2])

    def _derivative(self) -> list[float]:
        # Of <g, d> with the direction d of g, so that nothing is squared.
        value = torch.zeros((), dtype=torch.float32, device="cpu")
        for one, direction in zip(self._whole, self._direction, strict=True):
            if one is not None and direction is not None and one.requires_grad:
                value = value + _dot_in_graph(one, direction, self._norm)
        leaves = [weight for _, weight in self._weights]
        slopes = torch.autograd.grad(value, leaves, allow_unused=True, retain_graph=True)
        shares = torch.zeros(self._size, dtype=torch.float64, device="cpu")
        for (placed, _), slope in zip(self._weights, slopes, strict=True):
            if slope is not None:
                shares += placed.sums(slope)
        return (shares / self._norm).tolist()

    def by_search(self) -> list[_Found]:
        """Returns the largest examples by backwards from some of the rows.

        Up to :data:`SEARCH` examples are measured each; more are halved, the half with the larger
        share first. If no share is negative, those found are the largest.
        """
        if self._size <= SEARCH:
            all_found = [self._measured(i) for i in range(self._size)]
            if not _adds_up([*(share for _, _, share in all_found), self.shared]):
                raise _CannotTellError(NOT_LINEAR)
            return sorted(all_found, key=lambda one: -one[2])[:MOST]
        indices = self._halve()
        found = [self._measured(i) for i in indices]
        others = torch.ones(self._size, dtype=torch.bool, device="cpu")
        others[indices] = False
        rest = self._share(self._part(others))
        if not _adds_up([*(share for _, _, share in found), rest, self.shared]):
            raise _CannotTellError(NOT_LINEAR)
        return sorted(found, key=lambda one: -one[2])

    def _halve(self) -> list[int]:
        heap = [(-(1.0 - self.shared), 0, self._size)]
        indices: list[int] = []
        left = SEARCH - MOST - 1
        while heap and len(indices) < MOST:
            share, start, end = heapq.heappop(heap)
            if end - start == 1:
                indices.append(start)
                continue
            if left == 0:
                break
            left -= 1
            middle = (start + end) // 2
            mask = torch.zeros(self._size, dtype=torch.bool, device="cpu")
            mask[start:middle] = True
            half = self._share(self._part(mask))
            heapq.heappush(heap, (-half, start, middle))
            heapq.heappush(heap, (share + half, middle, end))
        return indices

    def _measured(self, example: int) -> _Found:
        mask = torch.zeros(self._size, dtype=torch.bool, device="cpu")
        mask[example] = True
        part = self._part(mask)
        return example, _total(part), self._share(part)

    def _part(self, mask: Tensor) -> list[Tensor | None]:
        part = self._backward(mask)
        if self._shared is None:
            return part
        return [
            one if one is None or shared is None else one - shared
            for one, shared in zip(part, self._shared, strict=True)
        ]

    def _share(self, part: Sequence[Tensor | None]) -> float:
        share = _inner(part, self._direction, self._norm) / self._norm
        if not math.isfinite(share):
            raise _CannotTellError(NOT_FINITE)
        return share


def _adds_up(shares: Sequence[float]) -> bool:
    if not all(map(math.isfinite, shares)):
        return False
    size = math.fsum(map(abs, shares))  # of parts that cancel more digits are lost
    return abs(math.fsum(shares) - 1.0) <= _TOLERANCE * max(1.0, size)


def _dot_in_graph(gradient: Tensor, direction: Tensor, norm: float) -> Tensor:
    if gradient.is_complex():
        gradient, direction = torch.view_as_real(gradient), torch.view_as_real(direction)
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return (gradient.to(wide) * (direction.to(wide) / norm)).sum().cpu()


def _inner(ones: Sequence[Tensor | None], others: Sequence[Tensor | None], norm: float) -> float:
    """Returns the inner product of gradients with others that are divided by ``norm``."""
    return math.fsum(
        _dot(one, other, norm)
        for one, other in zip(ones, others, strict=True)
        if one is not None and other is not None
    )


def _dot(one: Tensor, other: Tensor, norm: float) -> float:
    if one.layout is not torch.strided or other.layout is not torch.strided:
        return _dot_of_sparse(one, other, norm)
    a, b = in_double(one.detach()).flatten(), in_double(other.detach()).flatten() / norm
    return float(torch.vdot(a, b.to(a.device)).real)


def _dot_of_sparse(one: Tensor, other: Tensor, norm: float) -> float:
    if one.layout is torch.strided:
        one, other = other, one
    a = in_double(one.detach()).coalesce()
    b = in_double(other.detach())
    if b.layout is torch.strided:
        rows = b[tuple(a.indices())]
    else:
        return float((a * (b.coalesce() / norm)).coalesce().values().sum().real)
    return float(torch.vdot(a.values().flatten(), rows.flatten() / norm).real)


def _total(gradients: Sequence[Tensor | None]) -> float:
    return norm_of_norms([_norm(one) for one in gradients if one is not None])


def _norm(gradient: Tensor) -> float:
    """Returns the L2 norm of a gradient, in which nothing overflows or underflows."""
    values = in_double(gradient.detach())
    if values.layout is not torch.strided:
        values = values.coalesce().values()
    if values.numel() == 0:
        return 0.0
    largest = float(values.abs().max())
    if largest == 0.0 or not math.isfinite(largest):
        return largest
    return largest * float(torch.linalg.vector_norm(values / largest))


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]

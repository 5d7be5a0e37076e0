"""Examples: which example of the batch an element of a tensor belongs to.

For each piece of memory it is known how many bytes one example takes in it, so that the address of
an element tells its example, whatever view of the memory it is seen through. An operation hands
that on to its result if it keeps the rows of the batch, be it in another order that is known. Where
rows are mixed it is lost, and no example is named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradwatch.replay.operands import memory_of, named_arguments

# The rows of their results are others than those of their operands.
_LOSE = frozenset(
    {"index_put", "index_add", "index_copy", "index_fill", "scatter", "scatter_add", "put", "take"}
    | {"scatter_reduce", "bincount", "histc", "masked_select", "nonzero", "unique", "_unique2"}
    | {"unique_dim", "unique_consecutive", "_pack_padded_sequence", "embedding_dense_backward"}
    | {"convolution_backward", "masked_scatter", "repeat_interleave", "cdist", "_cdist_forward"}
    | {"searchsorted", "bucketize", "randperm", "tril_indices", "triu_indices", "multinomial"}
)
# They take rows from elsewhere along the dimensions that they are given.
_ALONG = frozenset({"flip", "roll", "sort", "argsort", "topk", "index_select", "gather", "cat"})
_REORDER = frozenset({"flip", "roll", "index_select", "index", "cat"})
_REDUCE = frozenset(
    {
        "sum",
        "mean",
        "amax",
        "amin",
        "max",
        "min",
        "prod",
        "all",
        "any",
        "argmax",
        "argmin",
        "median",
    }
    | {"std", "var", "std_mean", "var_mean", "logsumexp", "linalg_vector_norm", "norm", "nansum"}
)
_PRODUCTS = frozenset({"mm", "addmm", "_addmm_activation"})


class _Rows(NamedTuple):
    """How the examples lie in memory: one after the other, over and over.

    Attributes:
        each: Bytes of one row.
        ids: The example of each row, int64 ``[rows]``.
    """

    each: int
    ids: Tensor


class _Axis(NamedTuple):
    """The dimension of a tensor in which the rows lie, and how many indices of it are one row."""

    axis: int
    inner: int
    ids: Tensor


class Examples:
    """Knows which example the elements of the tensors of a replay belong to.

    Attributes:
        size: Number of examples in the batch; None if not known.
        unsure: Whether they may lie along another dimension than the first: a module that takes the
            time first and the batch second has been given what was taken for the batch first. Then
            none is named.
    """

    def __init__(self) -> None:
        """Knows of no tensor yet."""
        self.size: int | None = None
        self.unsure = False
        self._rows: dict[int | None, _Rows] = {}  # by memory

    def note_input(self, tensor: Tensor) -> None:
        """Notes an input; the first one with a dimension tells the batch size."""
        if self.size is None and tensor.dim():
            self.size = tensor.shape[0]
        self.note_given(tensor)

    def note_given(self, tensor: Tensor) -> None:
        """Notes a tensor that is given, if it is as long as the batch."""
        key = memory_of(tensor)
        if key is None or not tensor.dim() or tensor.layout is not torch.strided:
            return
        stride = tensor.stride(0)
        if tensor.shape[0] == self.size and stride:
            self._rows[key] = _Rows(
                stride * tensor.element_size(), torch.arange(self.size, device="cpu")
            )

    def note_like(self, tensor: Tensor, other: Tensor) -> None:
        """Notes a tensor whose examples lie as those of another one of the same shape."""
        key, found = memory_of(tensor), self._axis(memory_of(other), other)
        if key is not None and found is not None and tensor.shape == other.shape:
            self._keep(key, tensor, found)

    def note_same(self, key: int, other: int) -> None:
        """Notes that a piece of memory holds what another one holds."""
        if other in self._rows:
            self._rows[key] = self._rows[other]
        else:
            self._rows.pop(key, None)

    def note_result(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        operands: Sequence[tuple[int | None, Tensor]],
        result: tuple[int, Tensor],
    ) -> None:
        """Notes the result of an operation that is no view of an operand."""
        key, tensor = result
        self._rows.pop(key, None)
        if self.size is None or tensor.layout is not torch.strided:
            return
        name = func.overloadpacket.__name__.rstrip("_")
        if name in _LOSE:
            return
        placed = [self._axis(*one) for one in operands]
        if not any(placed):  # as of most operations on weights
            return
        given = named_arguments(func, args, kwargs)
        for position, found in enumerate(placed):
            if found is None:
                continue
            operand = operands[position][1]
            axis = self._moved(name, given, position, operand, found.axis)
            if axis is not None:
                if axis < tensor.dim() and tensor.shape[axis] == operand.shape[found.axis]:
                    self._keep(key, tensor, found._replace(axis=axis))
                    return
            elif name in _REORDER and found.inner == 1:
                ids = _reordered(name, given, operand.dim(), placed, found)
                length = tensor.shape[found.axis] if found.axis < tensor.dim() else -1
                if ids is not None and len(ids) == length:
                    self._keep(key, tensor, found._replace(ids=ids))
                    return

    def note_time_first(self, operands: Sequence[tuple[int | None, Tensor]]) -> None:
        """Notes what an operation in a module that takes the time first is given."""
        found = next((self._axis(*one) for one in operands if one[1].dim() == 3), None)
        self.unsure |= found is not None and found.axis == 0 and found.inner == 1

    def of(self, tensor: Tensor, marked: Tensor) -> tuple[int, ...] | None:
        """Returns the examples in which any element is marked; None if that is not known.

        ``marked`` has the shape of the tensor.
        """
        return self._found(tensor, marked, everywhere=False)

    def wholly(self, tensor: Tensor, marked: Tensor) -> tuple[int, ...] | None:
        """Returns the examples in which every element is marked; None if that is not known."""
        return self._found(tensor, marked, everywhere=True)

    # -- where the examples lie ------------------------------------------------------------------

    def _keep(self, key: int, tensor: Tensor, found: _Axis) -> None:
        stride = tensor.stride(found.axis)
        if stride:
            self._rows[key] = _Rows(stride * found.inner * tensor.element_size(), found.ids)

    def _axis(self, key: int | None, tensor: Tensor) -> _Axis | None:
        """Returns where the rows lie in a tensor; None if that is not known."""
        rows = self._rows.get(key)
        if rows is None or self.size is None or tensor.layout is not torch.strided:
            return None
        each, item = rows.each, tensor.element_size()
        first = tensor.storage_offset() * item // each
        sides = [*enumerate(zip(tensor.shape, tensor.stride(), strict=True))]
        # A single row only if nothing else can be it: the stride of a length of 1 says little.
        for axis, (length, stride) in sorted(sides, key=lambda side: side[1][0] == 1):
            step = stride * item
            one_row = length == 1 and step == each
            if one_row or (step and step <= each < step * length and each % step == 0):
                # Some of the rows: which ones depends on where it begins.
                inner, ids = each // step, rows.ids
                if first % len(ids) or length // inner % len(ids):
                    ids = ids.roll(-first)[: -(-length // inner)]
                return _Axis(axis, inner, ids)
        # A batch of one: no dimension tells it.
        if self.size == 1 and tensor.dim():
            return _Axis(0, tensor.shape[0], rows.ids[:1])
        return None

    def _moved(
        self,
        name: str,
        given: Mapping[str, Any],
        position: int,
        operand: Tensor,
        axis: int,
    ) -> int | None:
        """Returns where in the result the rows of an operand lie, in their order; None if not."""
        rank = operand.dim()
        if name in _PRODUCTS:
            # [n, k] @ [k, m]: rows come from the first matrix, columns from the second.
            first = position == (1 if name != "mm" else 0)
            return axis if axis == (0 if first else 1) else None
        if name in ("bmm", "baddbmm"):
            return axis if axis == 0 else None
        if name == "index":
            return _indexed(given.get("indices") or (), operand, axis, position, self.size)
        if name == "stack":
            return axis + 1 if given.get("dim", 0) % (rank + 1) <= axis else axis
        if name == "repeat":
            repeats = given.get("repeats") or ()
            shift = len(repeats) - rank
            return axis + shift if repeats[axis + shift] == 1 else None
        if name == "embedding":
            return axis if operand is given.get("indices") else None
        dims = _dimensions(given, rank)
        if name in _ALONG:
            return None if axis in (dims if dims is not None else range(rank)) else axis
        if "keepdim" in given or (name in _REDUCE):
            if dims is None or axis in dims:
                return None
            return axis if given.get("keepdim") else axis - sum(one < axis for one in dims)
        return axis

    def _found(self, tensor: Tensor, marked: Tensor, everywhere: bool) -> tuple[int, ...] | None:
        rows = self._rows.get(memory_of(tensor))
        if (
            rows is None
            or self.unsure
            or not self.size
            or marked.shape != tensor.shape
            or not tensor.dim()
        ):
            return None
        if not bool(marked.any()):  # most often, and what follows is slow
            return ()
        item = tensor.element_size()
        start = int(tensor.storage_offset()) * item
        address = torch.full((1,) * tensor.dim(), start, device="cpu")
        for axis, (length, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            form = [1] * tensor.dim()
            form[axis] = length
            address = address + (torch.arange(length, device="cpu") * (stride * item)).view(form)
        example = rows.ids[address // rows.each % len(rows.ids)].expand(tensor.shape)
        counts = torch.bincount(example[marked.cpu()], minlength=self.size)
        chosen = counts > 0
        if everywhere:
            chosen &= counts == torch.bincount(example.flatten(), minlength=self.size)
        return tuple(torch.nonzero(chosen).flatten().tolist())


def _reordered(
    name: str,
    given: Mapping[str, Any],
    rank: int,
    placed: Sequence[_Axis | None],
    found: _Axis,
) -> Tensor | None:
    """Returns the examples of the rows of a result that has them in another order."""
    axis, ids = found.axis, found.ids
    if name == "cat":
        parts = [one for one in placed if one is not None and one[:2] == found[:2]]
        return torch.cat([one.ids for one in parts]) if len(parts) == len(placed) else None
    if name == "index":
        indices: Sequence[Tensor | None] = given.get("indices") or ()
        used = [one for one in indices if one is not None]
        if len(used) != 1:
            return None
        index = used[0].cpu()
        if index.dtype is torch.bool and indices[0] is used[0] and axis == 0:
            return ids[index.nonzero()[:, 0]]
        along = len(indices) > axis and indices[axis] is used[0] and index.dim() == 1
        return ids[index] if along else None
    dims = _dimensions(given, rank)
    if name == "index_select":
        return ids[given["index"].cpu()]
    if name == "flip" and dims is not None and axis in dims:
        return ids.flip(0)
    if name == "roll" and dims is not None and axis in dims:
        shifts = given["shifts"]
        return ids.roll(shifts if isinstance(shifts, int) else shifts[dims.index(axis)])
    return None


def _dimensions(given: Mapping[str, Any], rank: int) -> list[int] | None:
    """Returns the dimensions that an operation is given, from 0 on; None if it is given none."""
    dims = given.get("dim", given.get("dims"))
    if isinstance(dims, int):
        dims = [dims]
    if not dims:
        return None
    return [one % max(rank, 1) for one in dims]


def _indexed(
    indices: Sequence[Tensor | None],
    operand: Tensor,
    axis: int,
    position: int,
    size: int | None,
) -> int | None:
    """Returns where the rows lie in ``operand[indices]``; ``position`` 0 is the operand."""
    used = [i for i, one in enumerate(indices) if one is not None]
    first = indices[used[0]] if used else None
    if position > 0:  # a table that is looked up by tensors that are themselves of the batch
        looked_up = used == [0] and first is not None and first.dtype is not torch.bool
        return axis if looked_up else None
    if axis not in used:
        return axis if axis < min(used, default=axis + 1) else None
    # table[arange(batch), target]: each row for itself.
    if axis == 0 and used[0] == 0 and first is not None and first.dim() == 1:
        in_order = first.dtype is not torch.bool and len(first) == size
        if in_order and bool((first.cpu() == torch.arange(len(first), device="cpu")).all()):
            return 0
    return None

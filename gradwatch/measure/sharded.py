"""Norms of gradients that are sharded over ranks (FSDP2, tensor parallelism)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradwatch.measure.deferred import Deferred
from gradwatch.measure.devices import exact_dtype, in_exact, sent
from gradwatch.measure.gathering import index_tensor
from gradwatch.measure.norms import FirstNonFinite, Measurement, NonFiniteCount, Origin, total_norm
from gradwatch.measure.parameters import is_sharded

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Placements = tuple[Any, ...]
"""How a tensor lies on its mesh: one ``Placement`` of torch for each dimension."""

SPLIT_OTHERWISE = (
    "{count} gradient(s) are sharded over a dimension of their mesh over which no parameter is, "
    "and gradwatch does not add up norms along it. Redistribute them as their parameters are."
)
PARTIAL_ON_MANY_DIMENSIONS = (
    "{count} gradient(s) are sums that are still pending (Partial) on a mesh of {dimensions} "
    "dimensions, which gradwatch cannot add up. Apply fully_shard() to the modules too, so that "
    "their gradients are reduced."
)


# What an exchange holds: norms, norms and the statistics of a step, or the row of an update.
KINDS = NORMS, NORMS_AND_STATISTICS, UPDATE = 0, 1, 2


class RanksPartedError(RuntimeError):
    """The ranks do not exchange their norms, in this step or no longer; the training goes on."""


class MeetAgainError(RanksPartedError):
    """Other ranks were not in the same step yet; they may be if this rank sends its norms again."""


@dataclass(frozen=True, slots=True)
class ClipSides:
    """The norms before and after the user's clip: of this rank's parts, or of whole gradients.

    Attributes:
        before: The measurement before the clip.
        after: The measurement at the start of the step.
        first_nonfinite: The first parameter whose gradient was not finite; None if there is none,
            or if the numbers have not arrived from the device yet.
        nonfinite_count: The number of parameters whose gradient was not finite.
    """

    before: Measurement
    after: Measurement
    first_nonfinite: FirstNonFinite | None
    nonfinite_count: int


def all_reduce_norms(
    shards: Shards,
    local: ClipSides,
    placed: Mapping[int, Placements],
    partial: dict[int, Tensor],
    norm_type: float,
    extra: Callable[[PackedAllReduce], None] | None = None,
) -> ClipSides:
    """Combines the norms of every rank's parts into the norms of the whole gradients.

    All ranks must call it, even one that has no gradient or only empty parts.

    Args:
        shards: All sharded parameters, in the same order on every rank.
        local: This rank's norms, of the parts that it holds.
        placed: How the gradients lie on their mesh, by parameter index: not always as their
            parameters do.
        partial: This rank's term of each gradient that is still to be summed over ranks (Partial),
            by parameter index.
        norm_type: The p of the norms, positive or ``math.inf``.
        extra: Adds further numbers to the same all-reduce.

    Returns:
        The norms of the whole gradients, the same on every rank.
    """
    before, after = local.before, local.after
    packed = PackedAllReduce(shards, after.total.tensor.device, partial, placed)
    rows = [shards.full_row(m.indices, m.norms.tensor) for m in (before, after)]
    # The p-th powers of norms can be summed. Largest magnitudes cannot, and a MAX reduction would
    # be a second all-reduce. They are gathered instead, in the same all-reduce, at a cost of one
    # number per rank.
    is_max = math.isinf(norm_type)
    slots = [packed.add_gather(r) if is_max else packed.add_sum(r.pow(norm_type)) for r in rows]
    # A rank may lack a gradient that others have (an expert that saw no token), so the ranks must
    # agree on which gradients exist.
    is_here = shards.full_row(after.indices, torch.ones_like(after.norms.tensor))
    presence = packed.add_sum(is_here)
    first = packed.add_gather(_encode_first_nonfinite(local, is_here))
    shards.kind = NORMS
    if extra is not None and shards.settle():
        shards.kind = NORMS_AND_STATISTICS
        extra(packed)
    packed.run()
    indices = list(after.indices)
    if after.total.at_hand:  # on a device nonzero() would wait
        indices = torch.nonzero(packed.sums[presence]).flatten().tolist()
    if is_max:
        whole = [packed.gathered[slot].amax(0) for slot in slots]
    else:
        whole = [packed.sums[slot].pow(1 / norm_type) for slot in slots]
    for index in partial:
        # The norm of a sum does not follow from the norms of its terms: compute it from the sum.
        norm = total_norm(packed.partial[index], norm_type)
        ratio = _ratio(before, after, index)
        whole[1][index] = norm
        whole[0][index] = norm * ratio
        packed.partial[index] = packed.partial[index] * ratio
    overflowed = before.overflowed or after.overflowed
    sides = [_measurement(shards, indices, row, norm_type, overflowed) for row in whole]
    reduced = replace(local, before=sides[0], after=sides[1])
    if not after.total.at_hand:
        return reduced
    return _with_first_nonfinite(reduced, packed, packed.gathered[first])


def _measurement(
    shards: Shards, indices: list[int], row: Tensor, norm_type: float, overflowed: bool
) -> Measurement:
    norms = row[index_tensor(tuple(indices), row.device)]
    wide = Deferred(total_norm(norms, norm_type))
    total = Deferred(wide.tensor.to(shards.dtype))
    # Even if the norm of every part fits into float32, that of the whole may not.
    if wide.at_hand and (overflowed or math.isfinite(wide.value())):
        overflowed = overflowed or math.isinf(total.value())
    if overflowed:
        return Measurement(indices, Deferred(norms), wide, overflowed=math.isfinite(wide.value()))
    return Measurement(indices, Deferred(norms.to(shards.dtype)), total)


def unknown_norms(local: ClipSides) -> ClipSides:
    """Returns what is known of the whole gradients where the ranks do not exchange their norms."""
    total = local.after.total.tensor
    nothing = Measurement(
        [], Deferred(total.new_zeros(0)), Deferred(torch.full_like(total, math.nan))
    )
    return replace(local, before=nothing, after=nothing)


def _ratio(before: Measurement, after: Measurement, index: int) -> Tensor:
    """Returns the ratio of a gradient's norm before and after the user's clip, on this rank."""
    new = after.norms.tensor[after.indices.index(index)]
    if index not in before.indices:
        return torch.ones_like(new)
    old = before.norms.tensor[before.indices.index(index)]
    return torch.where(new > 0, old / new, torch.ones_like(new))


def _encode_first_nonfinite(local: ClipSides, like: Tensor) -> Tensor:
    """Encodes this rank's first bad parameter as nine numbers, all 0 if it has none.

    Their order makes the lexicographically smallest row of all ranks the first one in time, and in
    backward order.
    """
    first = local.first_nonfinite
    if first is None or first.counts is None:
        return like.new_zeros(9)
    # What came after a backward came before the next one; and 0 is for a rank that has none.
    moment = first.micro_batch + 0.5 * (first.origin in (Origin.AFTER, Origin.STALE))
    where = [max(moment, 0.5), first.position, first.index, first.norm, *first.counts]
    weight = first.weights[0] if first.weights else -1
    return like.new_tensor([*where, first.micro_batch, first.origin, weight])


def _with_first_nonfinite(
    reduced: ClipSides, packed: PackedAllReduce, encoded: Tensor
) -> ClipSides:
    """Adds the first bad parameter of any rank, with its NaN and Inf elements summed over ranks.

    Which rank it came from is not known: gradients were reduced over the ranks, or the ranks have
    computed them together.
    """
    rows = [row for row in encoded.tolist() if row[0] > 0]
    bad = {i for m in (reduced.before, reduced.after) for i in m.nonfinite_indices()}
    if not rows:
        return replace(reduced, nonfinite_count=len(bad))
    moment, position, index, norm, _, _, micro_batch, origin, _ = min(rows)
    about, weight = packed.rows_about(int(index), encoded)
    same = [row for row in about.tolist() if (row[0], row[2]) == (moment, index)]
    counts = NonFiniteCount(*(round(weight * sum(row[i] for row in same)) for i in (4, 5)))
    weights = sorted({int(row[8]) for row in rows if row[8] >= 0})
    first = FirstNonFinite(
        int(index),
        int(micro_batch),
        norm,
        counts,
        int(position),
        Origin(int(origin)),
        weights if origin == Origin.WEIGHTS else (),
    )
    return replace(reduced, first_nonfinite=first, nonfinite_count=max(len(bad), 1))


@dataclass(slots=True)
class PackedAllReduce:
    """All numbers that the ranks exchange in one step, packed into one all-reduce per mesh.

    Numbers are added first, and :meth:`run` sends them all: a collective costs latency, while the
    few numbers in it cost next to nothing.

    Attributes:
        shards: The sharded parameters.
        device: The device of the numbers.
        partial: Gradients that are still to be summed over ranks, by parameter index: before
            :meth:`run` this rank's term of each, afterwards the sum, float64 and flat.
        placed: How the gradients lie on their mesh, by parameter index; a parameter that is missing
            has a gradient that lies as itself does.
        sums: For each slot of :meth:`add_sum` the sum over the ranks ``[columns]``, float64.
        gathered: For each slot of :meth:`add_gather` the values of all ranks ``[ranks, n]``.
        exchanged: Whether :meth:`run` has come to its end.
    """

    shards: Shards
    device: torch.device
    partial: dict[int, Tensor] = field(default_factory=dict)
    placed: Mapping[int, Placements] = field(default_factory=dict)
    sums: list[Tensor] = field(default_factory=list)
    gathered: list[Tensor] = field(default_factory=list)
    exchanged: bool = False
    _rows: list[Tensor] = field(default_factory=list)
    _of_gradients: list[bool] = field(default_factory=list)
    _own: list[Tensor] = field(default_factory=list)

    def add_sum(self, row: Tensor, of_gradients: bool = True) -> int:
        """Adds a row ``[columns]``, float64, to be summed; returns its slot.

        ``of_gradients`` says whether its numbers are of gradients, or of parameters.
        """
        self._rows.append(row)
        self._of_gradients.append(of_gradients)
        return len(self._rows) - 1

    def add_gather(self, values: Tensor) -> int:
        """Adds values ``[n]``, float64, to be gathered from every rank; returns their slot."""
        self._own.append(values)
        return len(self._own) - 1

    def rows_about(self, index: int, gathered: Tensor) -> tuple[Tensor, float]:
        """Returns the gathered rows of the ranks that hold a part of a gradient, and their weight.

        Ranks that hold the same part count the same elements: the weight says how often each counts
        in a sum. All ranks hold a gradient that is not sharded, and one row tells of it.
        """
        start = 0
        for group in self.shards.groups:
            if index in group.indices:
                weight = group.weights_of(self.placed)[group.indices.index(index)]
                return gathered[start : start + group.size], weight
            start += group.size
        bad = gathered[(gathered[:, 0] > 0) & (gathered[:, 2] == index)]
        return bad[:1], 1.0

    def run(self) -> None:
        """Runs the all-reduce and fills ``sums``, ``gathered`` and ``partial``.

        Raises:
            RanksPartedError: If the ranks do not exchange anything, in this step or no longer.
        """
        self.sums = [row.clone() for row in self._rows]
        by_mesh: list[list[Tensor]] = [[] for _ in self._own]
        for group in self.shards.groups:
            self._run(group, by_mesh)
        self.gathered = [rows[0] if len(rows) == 1 else torch.cat(rows) for rows in by_mesh]
        self.exchanged = True

    def _run(self, group: MeshGroup, gathered: list[list[Tensor]]) -> None:
        columns = index_tensor(tuple(group.indices), self.device)
        weights = [self.shards.weights(group, self.device, placed) for placed in ({}, self.placed)]
        partial = [index for index in group.indices if index in self.partial]
        if partial and group.dimensions > 1:
            raise NotImplementedError(
                PARTIAL_ON_MANY_DIMENSIONS.format(count=len(partial), dimensions=group.dimensions)
            )
        parts = [
            *(
                row[columns] * weights[of_gradients]
                for row, of_gradients in zip(self._rows, self._of_gradients, strict=True)
            ),
            *(_at_own_rank(values, group) for values in self._own),
            *(in_exact(self.partial[index].reshape(-1)) for index in partial),
        ]
        payload = torch.cat([part.reshape(-1) for part in parts])
        for process_group in group.groups:
            payload = self.shards.reduce(payload, process_group)
        reduced = list(torch.split(payload, [part.numel() for part in parts]))
        # Unpack in the order in which ``parts`` was packed.
        for total in self.sums:
            total.index_copy_(0, columns, reduced.pop(0))
        for rows in gathered:
            rows.append(reduced.pop(0).reshape(group.size, -1))
        for index in partial:
            self.partial[index] = reduced.pop(0)


def _at_own_rank(values: Tensor, group: MeshGroup) -> Tensor:
    """Puts values into this rank's row of a zero matrix, so that a sum over ranks gathers them."""
    rows = values.new_zeros(group.size, values.numel())
    rows[group.rank] = values
    return rows


def _all_reduce(payload: Tensor, group: Any) -> Tensor:
    dist.all_reduce(payload, group=group)
    return payload


class Shards:
    """All sharded tensors of a parameter table, grouped by device mesh.

    Attributes:
        columns: The number of tensors in the table.
        dtype: The dtype of the combined norms, the same on all ranks: float32 or float64.
        groups: The sharded parameters of each mesh.
        tensors: The tensors of the table.
        reduce: Sums a tensor over the ranks of a process group, in place or not, and returns it.
        settle: Called before numbers are packed; returns whether ranks may send what is not due in
            every step.
        stepping: The first parameter of the optimizer whose norms are summed; -1 for none.
        kind: Which of :data:`KINDS` is summed.
        is_step: Whether its step is taken, rather than skipped or thrown away.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Groups the tensors of a table; those that are not sharded are the same on every rank."""
        self.columns = len(tensors)
        self.tensors = tensors
        self.reduce: Callable[[Tensor, Any], Tensor] = _all_reduce
        self.settle: Callable[[], bool] = lambda: True
        self.stepping, self.is_step, self.kind = -1, True, NORMS
        # Decided by all tensors. Which of them have a gradient may differ between ranks, and the
        # ranks must choose the same dtype.
        double = any(tensor.dtype in (torch.float64, torch.complex128) for tensor in tensors)
        self.dtype = torch.float64 if double else torch.float32
        members: dict[Any, dict[int, DTensor]] = {}
        for index, tensor in enumerate(tensors):
            if is_sharded(tensor):
                members.setdefault(tensor.device_mesh, {})[index] = tensor
        self.groups = [MeshGroup.of(mesh, tensors) for mesh, tensors in members.items()]
        # Each is made only once: a copy from the host to a device waits for the device.
        self._weights: dict[tuple[torch.device, int, tuple[float, ...]], Tensor] = {}

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Shards | None:
        """Makes the shards of some tensors; None if none of them is sharded."""
        return cls(tensors) if any(map(is_sharded, tensors)) else None

    def full_row(self, indices: Sequence[int], values: Tensor) -> Tensor:
        """Puts values ``[len(indices)]`` into a row ``[columns]``, float64, 0 in other columns."""
        values = in_exact(values)
        row = values.new_zeros(self.columns)
        return row.index_copy_(0, index_tensor(tuple(indices), values.device), values)

    def weights(
        self, group: MeshGroup, device: torch.device, placed: Mapping[int, Placements]
    ) -> Tensor:
        """Returns the weights of a group on a device: tensor ``[len(group.indices)]``, float64.

        ``placed`` says of some tensors how they lie on the mesh; others lie as the parameters do.
        """
        weights = group.weights_of(placed)
        key = (device, id(group), weights)
        if key not in self._weights:
            there = torch.tensor(weights, dtype=exact_dtype(device), device="cpu")
            self._weights[key] = sent(there, device)
        return self._weights[key]


@dataclass(frozen=True, slots=True, eq=False)
class MeshGroup:
    """The parameters that are sharded over one device mesh, and how to sum over its ranks.

    Attributes:
        indices: Their indices in the parameter table.
        placements: For each parameter how it lies on the mesh.
        groups: Process groups to reduce over, one after the other; nearly always one. None stands
            for the whole world.
        rank: The position of this rank among those that take part.
        size: How many ranks take part.
        dimensions: The number of dimensions of the mesh.
        sizes: The number of ranks along each of its dimensions that are summed over.
        ranks: All ranks of the mesh, those that hold the same parts included.
    """

    indices: list[int]
    placements: list[Placements]
    groups: list[Any]
    rank: int
    size: int
    dimensions: int
    sizes: dict[int, int]
    ranks: list[int]

    @classmethod
    def of(cls, mesh: Any, members: dict[int, DTensor]) -> MeshGroup:
        """Works out how to sum the numbers of some parameters over one device mesh.

        ``members`` are the tensors by their index in the parameter table.
        """
        # Reduce only along dimensions that split a tensor; along the others all ranks hold the
        # same numbers.
        placements = [tensor.placements for tensor in members.values()]
        split = {d for one in placements for d in _split_dimensions(one)}
        dimensions = sorted(split) or list(range(mesh.ndim))
        sizes = [mesh.size(d) for d in dimensions]
        coordinate = mesh.get_coordinate()
        rank = 0
        for dimension, size in zip(dimensions, sizes, strict=True):
            rank = rank * size + coordinate[dimension]
        # A mesh has one process group per dimension. If several of them together are the whole
        # world, one all-reduce over the world does the work of several.
        whole_world = len(dimensions) > 1 and math.prod(sizes) == dist.get_world_size()
        return cls(
            indices=list(members),
            placements=placements,
            groups=[None] if whole_world else [mesh.get_group(d) for d in dimensions],
            rank=rank,
            size=math.prod(sizes),
            dimensions=mesh.ndim,
            sizes=dict(zip(dimensions, sizes, strict=True)),
            ranks=mesh.mesh.flatten().tolist(),
        )

    def weights_of(self, placed: Mapping[int, Placements]) -> tuple[float, ...]:
        """Returns the weight of one rank's number in the sum, for each parameter.

        It is ``1 / n`` if ``n`` ranks hold the same part, so that the part counts once. A gradient
        need not lie on the mesh as its parameter does: that of an embedding that is split by rows
        is whole on each rank if the output was. ``placed`` is as for :meth:`Shards.weights`.

        Raises:
            NotImplementedError: If a tensor is split along a dimension that is not summed over.
        """
        found = list(map(placed.get, self.indices, self.placements))
        split = list(map(_split_dimensions, found))
        others = sum(not self.sizes.keys() >= set(one) for one in split)
        if others:
            raise NotImplementedError(SPLIT_OTHERWISE.format(count=others))
        sizes = self.sizes.items()
        return tuple(1.0 / math.prod(n for d, n in sizes if d not in one) for one in split)


@lru_cache(maxsize=256)
def _split_dimensions(placements: Placements) -> list[int]:
    """Lists the mesh dimensions along which the ranks hold different parts of a tensor."""
    return [d for d, placement in enumerate(placements) if not placement.is_replicate()]


@lru_cache(maxsize=256)
def _is_partial(placements: Placements) -> bool:
    return any(placement.is_partial() for placement in placements)


def placements_of(gradients: Mapping[int, Tensor | None]) -> dict[int, Placements]:
    """Returns how gradients lie on their mesh, by parameter index; without those on none."""
    return {index: one.placements for index, one in gradients.items() if is_sharded(one)}


def pending_sums(placed: Mapping[int, Placements]) -> list[int]:
    """Lists the gradients that still have to be summed over ranks (a Partial placement)."""
    return [index for index, placements in placed.items() if _is_partial(placements)]

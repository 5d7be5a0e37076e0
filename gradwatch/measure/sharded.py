"""Norms of gradients of which every rank holds a part (FSDP2, tensor parallelism)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradwatch.measure.deferred import Deferred
from gradwatch.measure.norms import FirstNonFinite, Measurement, NonFiniteCount, total_norm
from gradwatch.measure.parameters import is_sharded

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

PARTIAL_ON_MANY_DIMENSIONS = (
    "{count} gradient(s) are sums that are still pending (Partial) on a mesh of {dimensions} "
    "dimensions, which gradwatch cannot add up. Apply fully_shard() to the modules too, so that "
    "their gradients are reduced."
)


@dataclass(frozen=True, slots=True)
class ClipSides:
    """The norms on both sides of the clip: of this rank's parts, or of the whole gradients.

    Attributes:
        before: The measurement before the clip.
        after: The measurement when the step begins.
        first_nonfinite: The first parameter that went bad; None while all is finite, or while the
            numbers are on their way from the device.
        nonfinite_count: How many parameters were bad.
    """

    before: Measurement
    after: Measurement
    first_nonfinite: FirstNonFinite | None
    nonfinite_count: int


def all_reduce_norms(
    shards: Shards,
    local: ClipSides,
    partial: dict[int, Tensor],
    norm_type: float,
    extra: Callable[[PackedAllReduce], None] | None = None,
) -> ClipSides:
    """Turns what this rank measured on its parts into numbers of the whole gradients.

    A rank that has no gradient, or an empty part, takes part all the same.

    Args:
        shards: The sharded parameters.
        local: What this rank measured.
        partial: What it holds of gradients that are sums not yet taken, by index.
        norm_type: The p of the norms.
        extra: Adds further numbers to the all-reduce.

    Returns:
        The same on every rank.
    """
    before, after = local.before, local.after
    packed = PackedAllReduce(shards, after.total.tensor.device, partial)
    rows = [shards.full_row(m.indices, m.norms.tensor) for m in (before, after)]
    # p-th powers add up. Largest magnitudes do not, and an all-reduce of maxima would be a second
    # one: to gather them costs one number per rank in the same one.
    is_max = math.isinf(norm_type)
    slots = [packed.add_gather(r) if is_max else packed.add_sum(r.pow(norm_type)) for r in rows]
    # A rank may lack a gradient that others have (an expert that saw no token): ask all of them.
    is_here = shards.full_row(after.indices, torch.ones_like(after.norms.tensor))
    presence = packed.add_sum(is_here)
    first = packed.add_gather(_encode_first_nonfinite(local, is_here))
    if extra is not None:
        extra(packed)
    packed.run()
    indices = list(after.indices)
    if after.total.at_hand:  # else nonzero() would wait for the device
        indices = torch.nonzero(packed.sums[presence]).flatten().tolist()
    if is_max:
        whole = [packed.gathered[slot].amax(0) for slot in slots]
    else:
        whole = [packed.sums[slot].pow(1 / norm_type) for slot in slots]
    for index in partial:
        # The norm of a sum is known only from the sum itself, not from the norms of its terms.
        norm = total_norm(packed.partial[index], norm_type)
        whole[1][index] = norm
        whole[0][index] = norm * _ratio(before, after, index)
    overflowed = before.overflowed or after.overflowed
    sides = [_measurement(shards, indices, row, norm_type, overflowed) for row in whole]
    reduced = replace(local, before=sides[0], after=sides[1])
    if not after.total.at_hand:
        return reduced
    return _with_first_nonfinite(reduced, packed.gathered[first])


def _measurement(
    shards: Shards, indices: list[int], row: Tensor, norm_type: float, overflowed: bool
) -> Measurement:
    norms = row[shards.index_tensor(indices, row.device)]
    wide = Deferred(total_norm(norms, norm_type))
    total = Deferred(wide.tensor.to(shards.dtype))
    # Parts that fit into float32 can make a whole that does not.
    if wide.at_hand and (overflowed or math.isfinite(wide.value())):
        overflowed = overflowed or math.isinf(total.value())
    if overflowed:
        return Measurement(indices, Deferred(norms), wide, overflowed=math.isfinite(wide.value()))
    return Measurement(indices, Deferred(norms.to(shards.dtype)), total)


def _ratio(before: Measurement, after: Measurement, index: int) -> Tensor:
    """Returns how much larger a gradient was before the loop changed it, on this rank's share."""
    new = after.norms.tensor[after.indices.index(index)]
    if index not in before.indices:
        return torch.ones_like(new)
    old = before.norms.tensor[before.indices.index(index)]
    return torch.where(new > 0, old / new, torch.ones_like(new))


def _encode_first_nonfinite(local: ClipSides, like: Tensor) -> Tensor:
    """Returns six numbers, all 0 for none. In this order the smallest row came first."""
    first = local.first_nonfinite
    if first is None or first.counts is None:
        return like.new_zeros(6)
    numbers = [first.micro_batch, first.position, first.index, first.norm, *first.counts]
    return like.new_tensor(numbers)


def _with_first_nonfinite(reduced: ClipSides, encoded: Tensor) -> ClipSides:
    """Names the first parameter that went bad on any rank, and counts its bad elements on all."""
    rows = [row for row in encoded.tolist() if row[0] > 0]  # micro-batches count from 1
    bad = {i for m in (reduced.before, reduced.after) for i in m.nonfinite_indices()}
    if not rows:
        return replace(reduced, nonfinite_count=len(bad))
    micro_batch, position, index, norm, *_ = min(rows)
    same = [row for row in rows if (row[0], row[2]) == (micro_batch, index)]
    counts = NonFiniteCount(int(sum(r[4] for r in same)), int(sum(r[5] for r in same)))
    first = FirstNonFinite(int(index), int(micro_batch), norm, counts, int(position))
    return replace(reduced, first_nonfinite=first, nonfinite_count=max(len(bad), 1))


@dataclass(slots=True)
class PackedAllReduce:
    """All that the ranks exchange in one step, packed into one all-reduce per mesh.

    Numbers are added first; :meth:`run` sends them all. A collective costs its latency, not the few
    numbers in it.

    Attributes:
        shards: The sharded parameters.
        device: Where the numbers are.
        partial: Gradients that are sums not yet taken, by index: what this rank has of each, and
            then the sum, float64 and flat.
        sums: For each slot of :meth:`add_sum` the sum over the ranks ``[columns]``, float64.
        gathered: For each slot of :meth:`add_gather` the values of all ranks ``[ranks, n]``.
    """

    shards: Shards
    device: torch.device
    partial: dict[int, Tensor] = field(default_factory=dict)
    sums: list[Tensor] = field(default_factory=list)
    gathered: list[Tensor] = field(default_factory=list)
    _rows: list[Tensor] = field(default_factory=list)
    _own: list[Tensor] = field(default_factory=list)

    def add_sum(self, row: Tensor) -> int:
        """Adds a row ``[columns]``, float64, to be summed; returns its slot."""
        self._rows.append(row)
        return len(self._rows) - 1

    def add_gather(self, values: Tensor) -> int:
        """Adds values ``[n]``, float64, to be had from every rank; returns their slot."""
        self._own.append(values)
        return len(self._own) - 1

    def run(self) -> None:
        """Does the all-reduce."""
        self.sums = [row.clone() for row in self._rows]
        by_mesh: list[list[Tensor]] = [[] for _ in self._own]
        for group in self.shards.groups:
            self._run(group, by_mesh)
        self.gathered = [rows[0] if len(rows) == 1 else torch.cat(rows) for rows in by_mesh]

    def _run(self, group: MeshGroup, gathered: list[list[Tensor]]) -> None:
        columns = self.shards.index_tensor(group.indices, self.device)
        weights = self.shards.weights(group, self.device)
        partial = [index for index in group.indices if index in self.partial]
        if partial and group.dimensions > 1:
            raise NotImplementedError(
                PARTIAL_ON_MANY_DIMENSIONS.format(count=len(partial), dimensions=group.dimensions)
            )
        parts = [
            *(row[columns] * weights for row in self._rows),
            *(_at_own_rank(values, group) for values in self._own),
            *(self.partial[index].reshape(-1).double() for index in partial),
        ]
        payload = torch.cat([part.reshape(-1) for part in parts])
        for process_group in group.groups:
            dist.all_reduce(payload, group=process_group)
        reduced = list(torch.split(payload, [part.numel() for part in parts]))
        # Unpacked in the order in which ``parts`` was packed.
        for total in self.sums:
            total.index_copy_(0, columns, reduced.pop(0))
        for rows in gathered:
            rows.append(reduced.pop(0).reshape(group.size, -1))
        for index in partial:
            self.partial[index] = reduced.pop(0)


def _at_own_rank(values: Tensor, group: MeshGroup) -> Tensor:
    """Puts values into the row of this rank among zeros, so that summing gathers them."""
    rows = values.new_zeros(group.size, values.numel())
    rows[group.rank] = values
    return rows


class Shards:
    """All sharded tensors of a parameter table, by mesh.

    Attributes:
        columns: How many tensors the table has.
        dtype: Of the norms that the ranks agree on, the same on all of them.
        groups: What is sharded, by mesh.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Sorts the tensors of a table; what is not sharded is the same on every rank."""
        self.columns = len(tensors)
        # Of all tensors, not of those that have a gradient: these may differ between ranks.
        double = any(tensor.dtype in (torch.float64, torch.complex128) for tensor in tensors)
        self.dtype = torch.float64 if double else torch.float32
        members: dict[Any, dict[int, DTensor]] = {}
        for index, tensor in enumerate(tensors):
            if is_sharded(tensor):
                members.setdefault(tensor.device_mesh, {})[index] = tensor
        self.groups = [MeshGroup.of(mesh, tensors) for mesh, tensors in members.items()]
        # Made once each: a copy from the host to a device waits for the device.
        self._indices: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}
        self._weights: dict[tuple[torch.device, int], Tensor] = {}

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Shards | None:
        """Makes the shards of some tensors; None where all of them are whole."""
        return cls(tensors) if any(map(is_sharded, tensors)) else None

    def full_row(self, indices: Sequence[int], values: Tensor) -> Tensor:
        """Puts values ``[len(indices)]`` into a row ``[columns]``, float64, 0 in other columns."""
        row = values.new_zeros(self.columns, dtype=torch.float64)
        return row.index_copy_(0, self.index_tensor(indices, values.device), values.double())

    def index_tensor(self, indices: Sequence[int], device: torch.device) -> Tensor:
        """Returns indices as a tensor on a device."""
        key = (device, tuple(indices))
        if key not in self._indices:
            self._indices[key] = torch.tensor(list(indices), dtype=torch.int64, device=device)
        return self._indices[key]

    def weights(self, group: MeshGroup, device: torch.device) -> Tensor:
        """Returns the weights of a group on a device: tensor ``[len(group.indices)]``, float64."""
        key = (device, id(group))
        if key not in self._weights:
            self._weights[key] = torch.tensor(group.weights, dtype=torch.float64, device=device)
        return self._weights[key]


@dataclass(frozen=True, slots=True, eq=False)
class MeshGroup:
    """The parameters that are sharded over one mesh, and how to sum over its ranks.

    Attributes:
        indices: Their indices in the parameter table.
        weights: For each the share of one rank's number: less than 1 where several ranks hold the
            same part, so that it counts once.
        groups: Process groups to reduce over, one after the other; nearly always one. None is the
            whole world.
        rank: This rank among those that take part.
        size: How many take part.
        dimensions: Dimensions of the mesh.
    """

    indices: list[int]
    weights: list[float]
    groups: list[Any]
    rank: int
    size: int
    dimensions: int

    @classmethod
    def of(cls, mesh: Any, members: dict[int, DTensor]) -> MeshGroup:
        """Works out how the numbers of some parameters on one device mesh add up."""
        # Only along dimensions that split something: over the others all ranks hold the same.
        split = {d for tensor in members.values() for d in _split_dimensions(tensor)}
        dimensions = sorted(split) or list(range(mesh.ndim))
        sizes = [mesh.size(d) for d in dimensions]
        coordinate = mesh.get_coordinate()
        rank = 0
        for dimension, size in zip(dimensions, sizes, strict=True):
            rank = rank * size + coordinate[dimension]
        # A mesh has a process group per dimension; the world does several of them in one go.
        whole_world = len(dimensions) > 1 and math.prod(sizes) == dist.get_world_size()
        return cls(
            indices=list(members),
            weights=[_weight(tensor, mesh, dimensions) for tensor in members.values()],
            groups=[None] if whole_world else [mesh.get_group(d) for d in dimensions],
            rank=rank,
            size=math.prod(sizes),
            dimensions=mesh.ndim,
        )


def _split_dimensions(tensor: DTensor) -> list[int]:
    """Lists the dimensions of the mesh along which ranks hold different parts."""
    return [d for d, placement in enumerate(tensor.placements) if not placement.is_replicate()]


def _weight(tensor: DTensor, mesh: Any, dimensions: Sequence[int]) -> float:
    split = _split_dimensions(tensor)
    copies: int = math.prod(mesh.size(d) for d in dimensions if d not in split)
    return 1.0 / copies

"""Gradients of which every rank holds a part (FSDP2, tensor parallelism): norms over all ranks."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from gradwatch.measure.deferred import Deferred
from gradwatch.measure.norms import FirstNonFinite, Measurement, NonFiniteCount, total_norm

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


# torch 2.4 has a package of the public name too, without the class.
_MODULE = "torch.distributed._tensor" if torch.__version__ < "2.5" else "torch.distributed.tensor"

PARTIAL_ON_MANY_DIMENSIONS = (
    "{count} gradient(s) are sums that are still pending (Partial) on a mesh of {dimensions} "
    "dimensions, which gradwatch cannot add up. Apply fully_shard() to the modules too, so that "
    "their gradients are reduced."
)


def is_sharded(tensor: Tensor | None) -> TypeGuard[DTensor]:
    """Tells whether a tensor is a DTensor."""
    # Importing torch's module takes long, and where nobody has there is no such tensor.
    module: Any = sys.modules.get(_MODULE)
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """Returns what this rank holds of a tensor: a plain tensor that shares its memory."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return part


def is_pending(gradient: Tensor | None) -> bool:
    """Tells whether a gradient is a sum over ranks that nobody has taken yet."""
    return is_sharded(gradient) and any(p.is_partial() for p in gradient.placements)


@dataclass(frozen=True, slots=True, eq=False)
class MeshGroup:
    """The parameters that are sharded over one mesh, and how to add up over its ranks.

    Attributes:
        indices: Their indices in the parameter table.
        weights: For each the share of one rank's number: less than 1 where several ranks hold the
            same part, so that it counts once.
        groups: Process groups to reduce over, one after the other; nearly always one.
        slot: The place of this rank among those that take part.
        slots: How many take part.
        dimensions: Dimensions of the mesh.
    """

    indices: list[int]
    weights: list[float]
    groups: list[Any]
    slot: int
    slots: int
    dimensions: int

    @classmethod
    def of(cls, mesh: Any, members: dict[int, DTensor]) -> MeshGroup:
        """Works out how the numbers of some parameters add up.

        Args:
            mesh: Their device mesh.
            members: The parameters by index.
        """
        split = {d for tensor in members.values() for d in _split_dimensions(tensor)}
        dimensions = sorted(split) or list(range(mesh.ndim))
        sizes = [mesh.size(d) for d in dimensions]
        place = mesh.get_coordinate()
        slot = 0
        for dimension, size in zip(dimensions, sizes, strict=True):
            slot = slot * size + place[dimension]
        whole_world = len(dimensions) > 1 and math.prod(sizes) == dist.get_world_size()
        return cls(
            indices=list(members),
            weights=[_weight(tensor, mesh, dimensions) for tensor in members.values()],
            groups=[None] if whole_world else [mesh.get_group(d) for d in dimensions],
            slot=slot,
            slots=math.prod(sizes),
            dimensions=mesh.ndim,
        )

    def reduce_(self, payload: Tensor) -> None:
        """Adds a tensor up over the ranks, in place."""
        for group in self.groups:
            dist.all_reduce(payload, group=group)


class Shards:
    """All sharded tensors of a parameter table, by mesh.

    Attributes:
        columns: How many tensors the table has.
        dtype: Of the norms that the ranks agree on, the same on all of them.
        groups: What is sharded, by mesh.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Sorts the tensors.

        Args:
            tensors: Those of the table; what is not sharded is the same on every rank.
        """
        self.columns = len(tensors)
        double = any(tensor.dtype in (torch.float64, torch.complex128) for tensor in tensors)
        self.dtype = torch.float64 if double else torch.float32
        members: dict[Any, dict[int, DTensor]] = {}
        for index, tensor in enumerate(tensors):
            if is_sharded(tensor):
                members.setdefault(tensor.device_mesh, {})[index] = tensor
        self.groups = [MeshGroup.of(mesh, tensors) for mesh, tensors in members.items()]
        self._places: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}
        self._weights: dict[tuple[torch.device, int], Tensor] = {}

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Shards | None:
        """Makes the shards of some tensors; None where all of them are whole."""
        return cls(tensors) if any(map(is_sharded, tensors)) else None

    def spread(self, indices: Sequence[int], values: Tensor) -> Tensor:
        """Puts values into a row over all columns.

        Args:
            indices: Columns of the values.
            values: Tensor ``[len(indices)]``.

        Returns:
            Tensor ``[columns]``, float64; 0 in all other columns.
        """
        row = values.new_zeros(self.columns, dtype=torch.float64)
        return row.index_copy_(0, self.places(indices, values.device), values.double())

    def places(self, indices: Sequence[int], device: torch.device) -> Tensor:
        """Returns indices as a tensor on a device; made once, as a copy to a device waits."""
        key = (device, tuple(indices))
        if key not in self._places:
            self._places[key] = torch.tensor(list(indices), dtype=torch.int64, device=device)
        return self._places[key]

    def weights(self, group: MeshGroup, device: torch.device) -> Tensor:
        """Returns the weights of a group on a device: tensor ``[len(group.indices)]``, float64."""
        key = (device, id(group))
        if key not in self._weights:
            self._weights[key] = torch.tensor(group.weights, dtype=torch.float64, device=device)
        return self._weights[key]


@dataclass(slots=True)
class Exchange:
    """What the ranks tell each other in one step, in one all-reduce per mesh.

    Contributions are noted down first; :meth:`run` sends them all; then the results can be asked
    for, with the ticket that a contribution gave.
    """

    shards: Shards
    device: torch.device
    _rows: list[Tensor] = field(default_factory=list)
    _notes: list[Tensor] = field(default_factory=list)
    _pending: dict[int, Tensor] = field(default_factory=dict)
    _sums: list[Tensor] = field(default_factory=list)
    _gathered: list[list[Tensor]] = field(default_factory=list)

    def add_up(self, row: Tensor) -> int:
        """Contributes a row whose columns are to be added up.

        Args:
            row: Tensor ``[columns]``, float64.

        Returns:
            The ticket for :meth:`total`.
        """
        self._rows.append(row)
        return len(self._rows) - 1

    def tell(self, note: Tensor) -> int:
        """Contributes a tensor that is to be had from every rank.

        Args:
            note: Tensor ``[n]``, float64, of the same length on every rank.

        Returns:
            The ticket for :meth:`told`.
        """
        self._notes.append(note)
        return len(self._notes) - 1

    def complete(self, pending: dict[int, Tensor]) -> None:
        """Contributes gradients that are sums which nobody has taken yet.

        Args:
            pending: What this rank has of each, by index.
        """
        self._pending = pending

    def run(self) -> None:
        """Does the exchange."""
        self._sums = [row.clone() for row in self._rows]
        self._gathered = [[] for _ in self._notes]
        for group in self.shards.groups:
            self._run(group)

    def total(self, ticket: int) -> Tensor:
        """Returns the sum of a row over the ranks: tensor ``[columns]``, float64."""
        return self._sums[ticket]

    def told(self, ticket: int) -> Tensor:
        """Returns the notes of all ranks: tensor ``[ranks, n]``, float64."""
        return torch.cat(self._gathered[ticket])

    def completed(self, index: int) -> Tensor:
        """Returns the sum of a pending gradient: float64, flat."""
        return self._pending[index]

    def _run(self, group: MeshGroup) -> None:
        columns = self.shards.places(group.indices, self.device)
        weights = self.shards.weights(group, self.device)
        pending = [index for index in group.indices if index in self._pending]
        if pending and group.dimensions > 1:
            raise NotImplementedError(
                PARTIAL_ON_MANY_DIMENSIONS.format(count=len(pending), dimensions=group.dimensions)
            )
        parts = [
            *(row[columns] * weights for row in self._rows),
            *(_in_slot(note, group) for note in self._notes),
            *(self._pending[index].reshape(-1).double() for index in pending),
        ]
        sizes = [part.numel() for part in parts]
        payload = torch.cat([part.reshape(-1) for part in parts])
        group.reduce_(payload)
        reduced = list(torch.split(payload, sizes))
        for total in self._sums:
            total.index_copy_(0, columns, reduced.pop(0))
        for gathered in self._gathered:
            gathered.append(reduced.pop(0).reshape(group.slots, -1))
        for index in pending:
            self._pending[index] = reduced.pop(0)


def _split_dimensions(tensor: DTensor) -> list[int]:
    """Lists the dimensions of the mesh along which ranks hold different parts."""
    return [d for d, placement in enumerate(tensor.placements) if not placement.is_replicate()]


def _weight(tensor: DTensor, mesh: Any, dimensions: Sequence[int]) -> float:
    split = _split_dimensions(tensor)
    copies: int = math.prod(mesh.size(d) for d in dimensions if d not in split)
    return 1.0 / copies


def _in_slot(note: Tensor, group: MeshGroup) -> Tensor:
    """Puts a note in the place of this rank, so that adding up keeps all of them."""
    slots = note.new_zeros(group.slots, note.numel())
    slots[group.slot] = note
    return slots


@dataclass(frozen=True, slots=True)
class Sides:
    """Both sides of the clip, and what went bad between.

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


def agree(
    shards: Shards,
    mine: Sides,
    pending: dict[int, Tensor],
    norm_type: float,
    ride: Callable[[Exchange], None] = lambda exchange: None,
) -> Sides:
    """Turns what this rank measured on its parts into numbers of the whole gradients.

    A rank that has no gradient, or an empty part, takes part all the same.

    Args:
        shards: The sharded parameters.
        mine: What this rank measured.
        pending: What it holds of gradients that are sums which nobody has taken yet, by index.
        norm_type: The p of the norms.
        ride: Adds further numbers to the exchange.

    Returns:
        The same on every rank.
    """
    before, after = mine.before, mine.after
    exchange = Exchange(shards, after.total.tensor.device)
    rows = [_Powers(exchange, m, norm_type) for m in (before, after)]
    there = shards.spread(after.indices, torch.ones_like(after.norms.tensor))
    presence = exchange.add_up(there)
    note = exchange.tell(_note(mine, there))
    exchange.complete(pending)
    ride(exchange)
    exchange.run()
    indices = list(after.indices)
    if after.total.at_hand:
        indices = torch.nonzero(exchange.total(presence)).flatten().tolist()
    whole = [row.norms() for row in rows]
    for index in pending:
        norm = total_norm(exchange.completed(index), norm_type)
        whole[1][index] = norm
        whole[0][index] = norm * _ratio(before, after, index)
    overflowed = before.overflowed or after.overflowed
    sides = [_measurement(shards, indices, row, norm_type, overflowed) for row in whole]
    agreed = replace(mine, before=sides[0], after=sides[1])
    return _with_first_nonfinite(agreed, exchange.told(note)) if after.total.at_hand else agreed


class _Powers:
    """A row of norms as numbers that can be added up, or compared, over ranks."""

    def __init__(self, exchange: Exchange, measurement: Measurement, norm_type: float) -> None:
        self._exchange = exchange
        self._p = norm_type
        row = exchange.shards.spread(measurement.indices, measurement.norms.tensor)
        maximum = math.isinf(norm_type)
        self._ticket = exchange.tell(row) if maximum else exchange.add_up(row.pow(norm_type))

    def norms(self) -> Tensor:
        if math.isinf(self._p):
            return self._exchange.told(self._ticket).amax(0)
        return self._exchange.total(self._ticket).pow(1 / self._p)


def _measurement(
    shards: Shards, indices: list[int], row: Tensor, norm_type: float, overflowed: bool
) -> Measurement:
    norms = row[shards.places(indices, row.device)]
    wide = Deferred(total_norm(norms, norm_type))
    total = Deferred(wide.tensor.to(shards.dtype))
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


def _note(mine: Sides, like: Tensor) -> Tensor:
    first = mine.first_nonfinite
    if first is None or first.counts is None:
        return like.new_zeros(6)
    facts = [first.micro_batch, first.place, first.index, first.norm, *first.counts]
    return like.new_tensor(facts)


def _with_first_nonfinite(agreed: Sides, told: Tensor) -> Sides:
    """Names the first parameter that went bad on any rank, and counts its bad elements on all."""
    seen = [note for note in told.tolist() if note[0] > 0]
    bad = {i for m in (agreed.before, agreed.after) for i in m.nonfinite_indices()}
    if not seen:
        return replace(agreed, nonfinite_count=len(bad))
    micro_batch, place, index, norm, *_ = min(seen)
    same = [note for note in seen if (note[0], note[2]) == (micro_batch, index)]
    counts = NonFiniteCount(int(sum(n[4] for n in same)), int(sum(n[5] for n in same)))
    first = FirstNonFinite(int(index), int(micro_batch), norm, counts, int(place))
    return replace(agreed, first_nonfinite=first, nonfinite_count=max(len(bad), 1))

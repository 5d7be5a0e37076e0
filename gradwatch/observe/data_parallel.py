"""DataParallel: the ranks that average a model's gradients among themselves."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradwatch.observe.fsdp import fully_sharded
from gradwatch.observe.ranks import is_distributed
from gradwatch.observe.shards import local_part

DIFFERENT_RANKS = (
    "The model's gradients are averaged over different ranks: some over {first}, others over "
    "{second}, and neither contains the other. What the micro-batches of all ranks weigh together "
    "has no one answer then. Use one process group, or one mesh, for all wrappers of the model."
)

BUCKET_BYTES = 25 * 2**20  # as a wrapper has by default
_NONE, _DENSE, _SPARSE = 0, 1, 2


@dataclass(frozen=True, slots=True, eq=False)
class DataParallel:
    """The ranks among which a model's gradients are averaged: each of them sees other data.

    Attributes:
        ranks: How many they are; at least 2.
        wrappers: The wrappers that do it for the model; empty where FSDP2 does.
        groups: Process groups to reduce over, one after the other; nearly always one. None is the
            whole world.
    """

    ranks: int
    wrappers: list[DistributedDataParallel]
    groups: list[Any]

    @classmethod
    def of(cls, model: object) -> DataParallel | None:
        """Finds out who averages a model's gradients.

        Under tensor parallelism the ranks that share one copy of the data count once. Where some
        parameters are averaged over fewer ranks than others, as experts may be, the most count.

        Args:
            model: What is watched.

        Returns:
            The ranks; None where there is no data parallelism, or only one rank of it.

        Raises:
            ValueError: If gradients are averaged over ranks of which none contain all others.
        """
        wrappers = wrappers_of(model)
        teams = [_Team.of_group(wrapper.process_group) for wrapper in wrappers]
        for module in fully_sharded(model):
            # The mesh of a parameter may have more dimensions, as under tensor parallelism.
            teams += [_Team.of_mesh(group.mesh_info.mesh) for group in parameter_groups(module)]
        widest = max(teams, key=lambda team: len(team.members), default=None)
        if widest is None or len(widest.members) == 1:
            return None
        for team in teams:
            if not team.members <= widest.members:
                first, second = sorted(widest.members), sorted(team.members)
                raise ValueError(DIFFERENT_RANKS.format(first=first, second=second))
        return cls(ranks=len(widest.members), wrappers=wrappers, groups=widest.groups)

    def add_up_(self, numbers: Tensor) -> Tensor:
        """Adds numbers up over the ranks, in place.

        Args:
            numbers: Tensor on the device of the model, of the same shape on every rank.

        Returns:
            The same tensor.
        """
        for group in self.groups:
            dist.all_reduce(numbers, group=group)
        return numbers

    def largest_(self, numbers: Tensor) -> Tensor:
        """Takes the largest of each number over the ranks, in place.

        Args:
            numbers: Tensor on the device of the model, of the same shape on every rank.

        Returns:
            The same tensor.
        """
        for group in self.groups:
            dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=group)
        return numbers


def wrappers_of(model: object) -> list[DistributedDataParallel]:
    """Lists the wrappers that reduce a model's gradients.

    They are the model or are in it, or else have it in them: a loop may call the wrapper and have
    the bare module watched.

    Args:
        model: What is watched.
    """
    if not isinstance(model, nn.Module):
        return []
    inside = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    return inside if inside or not is_distributed() else list(_around(model))


def all_wrappers() -> list[DistributedDataParallel]:
    """Lists the wrappers of the process; torch keeps no list of them."""
    # The class of an object, not isinstance(): that asks proxies, which may answer with an error.
    return [one for one in gc.get_objects() if issubclass(type(one), DistributedDataParallel)]


def parameter_groups(module: nn.Module) -> list[Any]:
    """Lists what FSDP2 communicates at once of a module that ``fully_shard`` was applied to.

    Args:
        module: The module.

    Returns:
        torch's private records; empty for a module whose parameters are all in inner ones.
    """
    state: Any = module._get_fsdp_state()  # type: ignore[operator]
    # Older versions of torch have one group at most, under the singular name.
    if not hasattr(state, "_fsdp_param_groups"):
        return [group for group in [state._fsdp_param_group] if group is not None]
    return list(state._fsdp_param_groups)


def align_gradients_(parameters: Sequence[Tensor], group: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Gives a parameter that has a dense gradient on another rank one of zeros here.

    It waits for the device once.

    Args:
        parameters: The same on every rank, in the same order.
        group: The process group.

    Returns:
        The parameters with a dense gradient and those with a sparse one; the others have none on
        any rank.
    """
    local = [
        _NONE if p.grad is None else _SPARSE if p.grad.is_sparse else _DENSE for p in parameters
    ]
    layouts = torch.tensor(local, dtype=torch.uint8, device=parameters[0].device)
    dist.all_reduce(layouts, op=dist.ReduceOp.MAX, group=group)
    found: dict[int, list[Tensor]] = {_NONE: [], _DENSE: [], _SPARSE: []}
    for parameter, layout in zip(parameters, layouts.tolist(), strict=True):
        found[layout].append(parameter)
        if layout == _DENSE and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return found[_DENSE], found[_SPARSE]


def average_gradients_(dense: Sequence[Tensor], sparse: Sequence[Tensor], group: Any) -> None:
    """Averages gradients over ranks, in place, as a wrapper would at the end of a backward.

    Args:
        dense: Parameters with a dense gradient, the same on every rank, in the same order.
        sparse: Those with a sparse one.
        group: The process group.
    """
    ranks = dist.get_world_size(group)
    for bucket in _buckets([local_part(p.grad) for p in dense if p.grad is not None]):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket]).div_(ranks)
        dist.all_reduce(flat, group=group)
        pieces = torch.split(flat, [gradient.numel() for gradient in bucket])
        for gradient, piece in zip(bucket, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))
    for parameter in sparse:
        parameter.grad = _rows(parameter).coalesce() / ranks
        dist.all_reduce(parameter.grad, group=group)


def _rows(parameter: Tensor) -> Tensor:
    """Returns a gradient in the layout in which an embedding's is sparse: by rows."""
    if parameter.grad is None:
        nowhere = torch.zeros(1, 0, dtype=torch.int64, device=parameter.device)
        nothing = parameter.new_zeros(0, *parameter.shape[1:])
        return torch.sparse_coo_tensor(nowhere, nothing, parameter.shape)
    return parameter.grad if parameter.grad.is_sparse else parameter.grad.to_sparse(1)


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Puts gradients together that can be sent at once."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for gradient in gradients:
        kinds.setdefault((gradient.dtype, gradient.device), []).append(gradient)
    for kind in kinds.values():
        bucket: list[Tensor] = []
        size = 0
        for gradient in kind:
            if bucket and size + gradient.nbytes > BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(gradient)
            size += gradient.nbytes
        yield bucket


@dataclass(frozen=True, slots=True)
class _Team:
    """Ranks that average some parameters, and the process groups that reach all of them."""

    members: frozenset[int]
    groups: list[Any]

    @classmethod
    def of_group(cls, group: Any) -> _Team:
        return cls(frozenset(dist.get_process_group_ranks(group)), [group])

    @classmethod
    def of_mesh(cls, mesh: Any) -> _Team:
        members = frozenset(mesh.mesh.flatten().tolist())
        whole_world = mesh.ndim > 1 and len(members) == dist.get_world_size()
        groups = [None] if whole_world else [mesh.get_group(d) for d in range(mesh.ndim)]
        return cls(members, groups)


def _around(model: nn.Module) -> Iterator[DistributedDataParallel]:
    """Finds the wrappers of the process that have a model in them."""
    for wrapper in all_wrappers():
        wrapped = getattr(wrapper, "module", None)
        if wrapped is not None and any(part is model for part in wrapped.modules()):
            yield wrapper

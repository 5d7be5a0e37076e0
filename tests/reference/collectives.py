"""How often the ranks communicate, as their groups count it.

Not by torch's CommDebugMode: it fails at the second backward inside it, and sees nothing of what
DistributedDataParallel's reducer does.
"""

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from gradwatch.hooks import exchange
from tests.neutrality.covering import Row
from tests.neutrality.loop import Loop
from tests.neutrality.ranked import layout_of

STEPS = 5


def count_each(setting: Row, ways: list[dict[str, Any] | None]) -> list[tuple[int, int]]:
    """Train on this rank unwatched, where a way is None, or watched with these options.

    Returns:
        For each way the collectives of all groups of the rank, those of gradwatch's own included,
        and over how many meshes.
    """
    return [_count(setting, way is not None, **(way or {})) for way in ways]


def _count(setting: Row, watched: bool, **options: Any) -> tuple[int, int]:
    own: list[dist.ProcessGroup] = []

    def connect(*arguments: Any, connect: Any = exchange.connected) -> Any:
        own.append(connect(*arguments))
        return own[-1]

    loop = Loop(
        setting, watched=watched, layout=layout_of(setting), rank=dist.get_rank(), **options
    )
    meshes = _meshes(loop.model)
    groups = {dist.group.WORLD}
    for mesh in meshes:
        groups.update(mesh.get_group(dimension) for dimension in range(mesh.ndim))
    before = _numbers(groups)
    with mock.patch.object(exchange, "connected", connect):
        loop.run(STEPS)
    return _numbers({*groups, *own}) - before, len(meshes)


def _meshes(model: torch.nn.Module) -> set[DeviceMesh]:
    return {p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh")}


def _numbers(groups: set[dist.ProcessGroup]) -> int:
    """Return the sum of the groups' sequence numbers, which every collective raises by one."""
    return sum(group._get_sequence_number_for_group() for group in groups)

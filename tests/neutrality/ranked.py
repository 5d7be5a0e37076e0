"""What each rank does: trains a setting twice, and tells where the two trainings differ."""

from typing import Any

import torch.distributed as dist

from tests.support.state import differences

from .covering import Row
from .layouts import Layout, ddp, fsdp, tensor_parallel
from .loop import Loop


def compare(setting: Row, steps: int) -> dict[str, Any]:
    """Train without and with a watcher on this rank, and return what tells them apart."""
    layout = layout_of(setting)
    bare, watched = (
        Loop(setting, watched=watched, layout=layout, rank=dist.get_rank())
        for watched in (False, True)
    )
    return {
        "differences": list(differences(bare.run(steps), watched.run(steps))),
        "steps": watched.steps_seen(),
        "overflows": bare.overflows,
    }


def layout_of(setting: Row) -> Layout:
    """Return the layout that a setting names, from the choices that it makes."""
    kind, chosen = setting["layout"], set(setting.values())
    no_sync = "every_sync" not in chosen
    if kind.startswith("ddp"):
        return ddp(
            int(kind.removeprefix("ddp")),
            hook=setting["hook"],
            no_sync=no_sync,
            gradient_as_bucket_view="bucket_view" in chosen,
            find_unused_parameters="find_unused" in chosen,
            static_graph="static_graph" in chosen,
        )
    if kind.startswith("tensor"):
        return tensor_parallel(int(kind.removeprefix("tensor")), whole="whole" in chosen)
    shape = [int(size) for size in kind.removeprefix("fsdp").split("x")]
    return fsdp(
        *shape,
        each="each" in chosen,
        mixed="mixed" in chosen,
        no_sync=no_sync,
        reshard="reshard" in chosen,
    )

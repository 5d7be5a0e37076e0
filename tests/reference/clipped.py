"""Two trainings that should clip alike: one by torch.nn.utils.clip_grad_norm_, one by the watcher."""

from typing import Any

import torch.distributed as dist

from tests.neutrality.covering import Row
from tests.neutrality.layouts import ALONE, Layout
from tests.neutrality.loop import MAX_NORM, Loop
from tests.neutrality.ranked import layout_of
from tests.support.float64 import widen
from tests.support.state import differences

STEPS = 10


def compare(setting: Row, layout: Layout = ALONE, rank: int = 0) -> dict[str, Any]:
    """Train both ways; return where they differ in a bit, and by how much at most."""
    plain = Loop({**setting, "own_clip": "clip"}, watched=False, layout=layout, rank=rank)
    watched = Loop(
        {**setting, "own_clip": "no_clip"}, watched=True, layout=layout, rank=rank, clip=MAX_NORM
    )
    bare, clipped = plain.run(STEPS), watched.run(STEPS)
    kept = ("parameters", "optimizers", "buffers")
    pairs = zip(plain.model.parameters(), watched.model.parameters(), strict=True)
    return {
        "differences": [text for key in kept for text in differences(bare[key], clipped[key], key)],
        "distance": max(float((widen(p) - widen(q)).abs().max()) for p, q in pairs),
        "clipped": int(watched.watcher.history.steps()["clipped"].sum()),
        "overflows": plain.overflows,
    }


def compare_on_rank(setting: Row) -> dict[str, Any]:
    """Do the same on one of several ranks."""
    return compare(setting, layout_of(setting), dist.get_rank())

"""What a watcher says to the other ranks: nothing under DDP, else one message per mesh and step."""

import pytest

from tests.neutrality.params import every_row
from tests.neutrality.ranked import layout_of
from tests.support.launch import on_ranks
from tests.support.options import STATISTICS

from .collectives import STEPS, count_each

REPLICATED = [
    {"layout": "ddp2", "hook": "no_hook", "model": "mlp"},
    {"layout": "ddp2", "hook": "fp16_hook", "model": "frozen", "graph": "find_unused",
     "micro_batches": "3", "buckets": "bucket_view"},
    {"layout": "ddp4", "hook": "no_hook", "model": "transformer", "optimizer": "AdamW_fused"},
]  # fmt: skip
SHARDED = [
    {"layout": "fsdp2", "model": "mlp", "units": "each"},
    {"layout": "fsdp2", "model": "transformer", "optimizer": "AdamW_fused", "micro_batches": "3"},
    {"layout": "fsdp2", "model": "checkpoint", "units": "each", "policy": "mixed"},
    {"layout": "fsdp2x2", "model": "mlp", "units": "each", "micro_batches": "3"},
    {"layout": "tensor1", "model": "mlp", "plan": "whole"},
    {"layout": "tensor2", "model": "mlp", "plan": "partial"},
]
TWO_DIMENSIONS = ("fsdp2x2", "tensor1", "tensor2")
WAYS = {
    "watching": {},
    "acting": {"clip": 0.1, "on_nonfinite": "skip"},
    "statistics": {"statistics": STATISTICS},
}


@pytest.fixture(scope="module")
def added(request):
    """For each way and rank, how many collectives the watcher adds, and over how many meshes."""
    bare, *watched = _seen(request.param, [None, *WAYS.values()])
    assert all(collectives > 0 for collectives, _ in bare)
    return {
        way: [(more - less, meshes) for (more, meshes), (less, _) in zip(seen, bare, strict=True)]
        for way, seen in zip(WAYS, watched, strict=True)
    }


def _seen(setting, ways):
    """Return for each way what each rank counted."""
    ranks = layout_of(setting).ranks
    # Torch gives a second mesh of two dimensions the groups of the first one, and uses others.
    launches = [[way] for way in ways] if setting["layout"] in TWO_DIMENSIONS else [ways]
    seen = [on_ranks(count_each, ranks, setting=setting, ways=part) for part in launches]
    return [way for launch in seen for way in zip(*launch, strict=True)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("added", every_row(REPLICATED), indirect=True)
def test_ddp_needs_no_further_collective(added, way):
    """Whatever is watched, clipped or skipped under DistributedDataParallel, no collective is added."""
    assert all(more == 0 for more, _ in added[way])


@pytest.mark.parametrize("way", ["watching", "acting"])
@pytest.mark.parametrize("added", every_row(SHARDED), indirect=True)
def test_sharded_gradients_need_one_collective_per_mesh_and_step(added, way):
    """Norms, the clip and the decision to skip cost at most one collective per mesh and step, on every rank."""
    assert all(0 < more <= STEPS * meshes for more, meshes in added[way])


@pytest.mark.parametrize("added", every_row(SHARDED), indirect=True)
def test_statistics_of_shards_need_one_more(added):
    """All further statistics together cost one more."""
    assert all(0 < more <= 2 * STEPS * meshes for more, meshes in added["statistics"])

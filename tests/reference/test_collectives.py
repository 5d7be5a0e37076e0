"""What a watcher says to the other ranks: nothing under DDP, else one message per mesh and step."""

import pytest

from tests.neutrality.params import every_row
from tests.neutrality.ranked import layout_of
from tests.support.launch import on_ranks
from tests.support.options import STATISTICS

from .collectives import STEPS, count

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
ACTING = {"clip": 0.1, "on_nonfinite": "skip"}


def _added(setting, **options):
    """Return for each rank how many collectives the watcher adds, and over how many meshes."""
    ranks = layout_of(setting).ranks
    bare = on_ranks(count, ranks, setting=setting, watched=False)
    watched = on_ranks(count, ranks, setting=setting, watched=True, **options)
    assert all(collectives > 0 for collectives, _ in bare)
    return [(w - b, meshes) for (w, meshes), (b, _) in zip(watched, bare, strict=True)]


@pytest.mark.parametrize(
    "options", [{}, ACTING, {"statistics": STATISTICS}], ids=["watching", "acting", "statistics"]
)
@pytest.mark.parametrize("setting", every_row(REPLICATED))
def test_ddp_needs_no_further_collective(setting, options):
    """Whatever is watched, clipped or skipped under DistributedDataParallel, no collective is added."""
    assert all(added == 0 for added, _ in _added(setting, **options))


@pytest.mark.parametrize("options", [{}, ACTING], ids=["watching", "acting"])
@pytest.mark.parametrize("setting", every_row(SHARDED))
def test_sharded_gradients_need_one_collective_per_mesh_and_step(setting, options):
    """Norms, the clip and the decision to skip cost at most one collective per mesh and step, on every rank."""
    assert all(0 < added <= STEPS * meshes for added, meshes in _added(setting, **options))


@pytest.mark.parametrize("setting", every_row(SHARDED))
def test_statistics_of_shards_need_one_more(setting):
    """All further statistics together cost one more."""
    seen = _added(setting, statistics=STATISTICS)
    assert all(0 < added <= 2 * STEPS * meshes for added, meshes in seen)

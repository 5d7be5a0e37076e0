"""watch(clip=...) leaves the weights that torch.nn.utils.clip_grad_norm_ leaves in the same loop."""

import pytest

from tests.neutrality.layouts import alone
from tests.neutrality.ranked import layout_of
from tests.support.launch import on_ranks

from .clipped import STEPS, compare, compare_on_rank
from .trainings import (
    ALONE_CLIPPED,
    DDP_CLIPPED,
    FOUR_RANKS_CLIPPED,
    FSDP_CLIPPED,
    FUSED_CLIPPED,
    TENSOR_CLIPPED,
)

NEAR = 1e-5  # the norm of shards is added up in another order
NEARER = 1e-6  # a fused optimizer divides the gradients where torch's clip multiplies them


def _on_ranks(setting):
    return on_ranks(compare_on_rank, layout_of(setting).ranks, setting=setting)


@pytest.mark.parametrize("setting", ALONE_CLIPPED)
def test_one_process_clips_to_the_same_bits(setting):
    """Weights and optimizer state after ten clipped steps are those of torch's own clip, to the last bit."""
    seen = compare(setting)
    assert seen["differences"] == []
    assert seen["clipped"] > 0


@pytest.mark.parametrize("setting", FUSED_CLIPPED)
def test_a_fused_optimizer_clips_alike(setting, machine):
    """The clip inside the kernel of a fused optimizer leaves the weights of torch's, but for rounding."""
    seen = compare(setting, alone(machine))
    assert seen["distance"] < NEARER
    assert seen["clipped"] > 0


@pytest.mark.parametrize("setting", DDP_CLIPPED)
def test_ddp_clips_to_the_same_bits(setting):
    """Under DistributedDataParallel they are so on every rank."""
    for seen in _on_ranks(setting):
        assert seen["differences"] == []
        assert seen["clipped"] > 0


@pytest.mark.parametrize("setting", [*FSDP_CLIPPED, *TENSOR_CLIPPED])
def test_shards_are_clipped_alike(setting):
    """With sharded or split parameters the whole weights are those of torch's clip, but for rounding."""
    for seen in _on_ranks(setting):
        assert seen["distance"] < NEAR
        assert seen["clipped"] > 0


@pytest.mark.parametrize("setting", FOUR_RANKS_CLIPPED)
def test_four_ranks_clip_alike(setting):
    """So they are on four ranks, in meshes of one and of two dimensions."""
    for seen in _on_ranks(setting):
        assert seen["distance"] < NEAR
        assert seen["clipped"] + seen["overflows"] == STEPS

"""In every training each record equals the float64 reference, on every rank."""

import pytest

from tests.neutrality.layouts import ALONE, alone
from tests.neutrality.ranked import layout_of
from tests.support.launch import on_ranks

from .agreement import differences_between_ranks, disagreements
from .taught import train, train_on_rank
from .trainings import (
    ALONE_RECORDED,
    DDP_RECORDED,
    FOUR_RANKS_RECORDED,
    FSDP_RECORDED,
    IN_TWO_DTYPES,
    MANAGED,
    OTHER_NORMS,
    OWN_CLIPPED,
    TENSOR_RECORDED,
)

STEPS = 6


def _check_on_ranks(setting):
    ranks = on_ranks(train_on_rank, layout_of(setting).ranks, setting=setting, steps=STEPS)
    assert [disagreements(setting, seen) for seen in ranks] == [[]] * len(ranks)
    assert differences_between_ranks(ranks) == []


@pytest.mark.parametrize("setting", ALONE_RECORDED)
def test_the_numbers_of_one_process_equal_the_reference(setting, machine):
    """Norms before and after the clip, coefficients, outcomes and counts are those of the float64 model."""
    assert disagreements(setting, train(setting, alone(machine), STEPS)) == []


@pytest.mark.parametrize("setting", OTHER_NORMS)
def test_other_norms_equal_the_reference(setting):
    """Where a policy clips by the L1 or the largest element all norms are of that kind, before and after."""
    seen = train(setting, ALONE, STEPS)
    assert disagreements(setting, seen) == []
    assert any(row["clipped"] for row in seen["recorded"]) == (setting["own_clip"] != "no_clip")


@pytest.mark.parametrize("setting", OWN_CLIPPED)
def test_the_loops_own_clip_is_seen_from_both_sides(setting):
    """Whichever way a loop clips, norms are those before and after it; a clip that did nothing is none."""
    seen = train(setting, ALONE, STEPS)
    assert disagreements(setting, seen) == []
    if setting["own_clip"] != "clip":
        clipped = {row["clipped"] for row in seen["recorded"]}
        assert clipped == {setting["own_clip"] != "clip_far"}


@pytest.mark.parametrize("setting", IN_TWO_DTYPES)
def test_the_numbers_of_two_dtypes_equal_the_reference(setting, machine):
    """So are those of a model of float32 and bfloat16."""
    assert disagreements(setting, train(setting, alone(machine), STEPS)) == []


@pytest.mark.parametrize("setting", MANAGED)
def test_the_numbers_of_a_managed_loop_equal_the_reference(setting, machine):
    """Where the watcher runs the backwards and steps, norms are those of the mean over each window."""
    assert disagreements(setting, train(setting, alone(machine), STEPS)) == []


@pytest.mark.parametrize("setting", DDP_RECORDED)
def test_the_numbers_under_ddp_equal_the_reference(setting):
    """Under DistributedDataParallel every rank records the norms of one process that has all the data."""
    _check_on_ranks(setting)


@pytest.mark.parametrize("setting", FSDP_RECORDED)
def test_the_numbers_under_fsdp_equal_the_reference(setting):
    """Under fully_shard every rank records the norms of the whole gradients, not of its shards."""
    _check_on_ranks(setting)


@pytest.mark.parametrize("setting", TENSOR_RECORDED)
def test_the_numbers_of_split_matrices_equal_the_reference(setting):
    """Under tensor parallelism every rank records the norms of the whole matrices, plain ones beside them."""
    _check_on_ranks(setting)


@pytest.mark.parametrize("setting", FOUR_RANKS_RECORDED)
def test_the_numbers_on_four_ranks_equal_the_reference(setting):
    """On four ranks, in meshes of one and of two dimensions, all record the same and the right norms."""
    _check_on_ranks(setting)

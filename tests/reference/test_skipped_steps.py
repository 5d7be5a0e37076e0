"""A step that one rank finds bad is left out by all ranks, and leaves nothing behind."""

import math

import pytest

from tests.neutrality.layouts import alone
from tests.neutrality.ranked import layout_of
from tests.support.launch import on_ranks

from .poisoned import POISONED, STEPS, refuse_on_rank, skip, skip_on_rank
from .trainings import (
    ALONE_SKIPPED,
    DDP_SKIPPED,
    FOUR_RANKS_SKIPPED,
    FSDP_SKIPPED,
    TENSOR_SKIPPED,
)

OUTCOMES = ["skipped_nonfinite" if step == POISONED else "applied" for step in range(STEPS)]


def _check(seen):
    assert seen["differences"] == []
    assert seen["outcomes"] == OUTCOMES
    assert [math.isfinite(norm) for norm in seen["norms"]] == [o == "applied" for o in OUTCOMES]
    assert [count > 0 for count in seen["nonfinite_parameters"]] == [
        o != "applied" for o in OUTCOMES
    ]
    assert {"nan", "skipped"} <= set(seen["kinds"])


@pytest.mark.parametrize("setting", ALONE_SKIPPED)
def test_one_process_is_as_if_the_step_had_not_been(setting, machine):
    """Weights and optimizer state are, to the last bit, those of a loop without the bad step."""
    _check(skip(setting, alone(machine)))


@pytest.mark.parametrize(
    "setting", [*DDP_SKIPPED, *FSDP_SKIPPED, *TENSOR_SKIPPED, *FOUR_RANKS_SKIPPED]
)
def test_all_ranks_are_as_if_the_step_had_not_been(setting):
    """One rank's NaN is every rank's skipped step; weights, shards and state are as without it."""
    for seen in on_ranks(skip_on_rank, layout_of(setting).ranks, setting=setting):
        _check(seen)


@pytest.mark.parametrize("setting", [FSDP_SKIPPED[0], TENSOR_SKIPPED[0], *FOUR_RANKS_SKIPPED[1:]])
def test_one_bad_element_of_one_shard_is_enough(setting):
    """A NaN that only the rank sees that holds it makes all of them skip, and the norm NaN on all."""
    seen = on_ranks(skip_on_rank, layout_of(setting).ranks, setting=setting, poison="shard")
    for rank in seen:
        _check(rank)
        spread = setting.get("own_clip") == "clip"  # torch's clip makes all gradients NaN
        assert rank["nonfinite_parameters"][POISONED] == 1 or spread


@pytest.mark.parametrize(
    "setting",
    [DDP_SKIPPED[0], FSDP_SKIPPED[0], TENSOR_SKIPPED[0], *FOUR_RANKS_SKIPPED],
)
def test_all_ranks_raise_at_the_same_step(setting):
    """With on_nonfinite="raise" every rank stops at the bad step, before any weight changes."""
    for seen in on_ranks(refuse_on_rank, layout_of(setting).ranks, setting=setting):
        assert seen == {"step": POISONED + 1, "differences": []}

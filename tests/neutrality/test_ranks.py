"""On several ranks: under DDP, FSDP2 and tensor parallelism, on every rank."""

import pytest

from tests.support.launch import on_ranks

from .loop import STEPS
from .params import every_row, pairs_slowly
from .ranked import compare, layout_of
from .ranked_settings import (
    DDP,
    DDP_FORBIDDEN,
    FSDP,
    FSDP_FORBIDDEN,
    ON_FOUR_RANKS,
    TENSOR,
    TENSOR_FORBIDDEN,
)

pytestmark = pytest.mark.slow


def _check(setting):
    for seen in on_ranks(compare, layout_of(setting).ranks, setting=setting, steps=STEPS):
        assert seen["differences"] == []
        assert STEPS - seen["overflows"] <= seen["steps"] <= STEPS


@pytest.mark.parametrize("setting", pairs_slowly(DDP, DDP_FORBIDDEN))
def test_a_watched_ddp_training_is_bit_identical(setting):
    """Under DistributedDataParallel each rank's whole state after twelve steps is that of the bare loop."""
    _check(setting)


@pytest.mark.parametrize("setting", pairs_slowly(FSDP, FSDP_FORBIDDEN))
def test_a_watched_fsdp_training_is_bit_identical(setting):
    """Under fully_shard each rank's shards and state after twelve steps are those of the bare loop."""
    _check(setting)


@pytest.mark.parametrize("setting", pairs_slowly(TENSOR, TENSOR_FORBIDDEN))
def test_a_watched_tensor_parallel_training_is_bit_identical(setting):
    """With matrices split over ranks each rank's state after twelve steps is that of the bare loop."""
    _check(setting)


@pytest.mark.parametrize("setting", every_row(ON_FOUR_RANKS))
def test_a_watched_training_on_four_ranks_is_bit_identical(setting):
    """On four ranks, in meshes of one and of two dimensions, nothing changes either."""
    _check(setting)

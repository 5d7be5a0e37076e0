"""Where a NaN came from, where several ranks share the parameters or the gradients."""

import contextlib
import math

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import gradwatch
from tests.support import zoo
from tests.support.launch import on_ranks

RANKS, STEPS, BAD_STEP, MICRO_BATCHES = 2, 5, 3, 3


def _model(sharded):
    return zoo.small_sharded() if sharded else DistributedDataParallel(zoo.small())


def _without_sync(model, sharded, micro_batch):
    last = micro_batch == MICRO_BATCHES - 1
    if sharded:
        model.set_requires_gradient_sync(last)
        return contextlib.nullcontext()
    return contextlib.nullcontext() if last else model.no_sync()


def _train(sharded, poison):
    """Trains in micro-batches, of which the last one reduces; rank 1 goes bad in the first one."""
    model = _model(sharded)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer, on_nonfinite="skip") as watcher:
        for step in range(1, STEPS + 1):
            for micro_batch in range(MICRO_BATCHES):
                seed = 100 * step + 10 * micro_batch + dist.get_rank()
                x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
                bad = step == BAD_STEP and dist.get_rank() == 1
                if poison == "batch" and bad and micro_batch == 0:
                    x[0, 0] = math.nan
                with _without_sync(model, sharded, micro_batch):
                    model(x).square().mean().backward()
            if poison == "write" and step == BAD_STEP:
                gradient = next(model.parameters()).grad
                getattr(gradient, "to_local", lambda own=gradient: own)()[0] = math.nan
            if poison == "weights" and step == BAD_STEP - 1:
                optimizer.step()
                optimizer.zero_grad()
                with torch.no_grad():
                    next(model.parameters()).mul_(math.nan)
                continue
            optimizer.step()
            optimizer.zero_grad()
    events = watcher.history.events()
    first = events[events["kind"] == "nan"].iloc[0]
    return first[["step", "micro_batch", "rank", "message"]].to_dict()


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_a_micro_batch_that_was_not_reduced_by_itself(sharded):
    """A rank blames the micro-batch that it saw; what came with the reduction may be of any."""
    for rank, told in enumerate(on_ranks(_train, RANKS, sharded=sharded, poison="batch")):
        assert told["step"] == BAD_STEP
        if rank == 1 and not sharded:
            assert (told["micro_batch"], told["rank"]) == (1, 1)
            assert "the first in backward order, in micro-batch 1" in told["message"]
        else:
            assert (told["micro_batch"], told["rank"]) == (0, -1)
            assert f"in one of micro-batches 1 to 3 of step {BAD_STEP};" in told["message"]
            assert "backward order" not in told["message"]


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_what_a_rank_writes_after_the_backward(sharded):
    """A write between backward and step is no fault of a micro-batch, on any rank."""
    for told in on_ranks(_train, RANKS, sharded=sharded, poison="write"):
        assert (told["step"], told["micro_batch"]) == (BAD_STEP, 0)
        assert f"made after the last backward of step {BAD_STEP}" in told["message"]


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_weights_that_were_bad_before(sharded):
    """Weights are named on every rank, whole or in parts."""
    for told in on_ranks(_train, RANKS, sharded=sharded, poison="weights"):
        assert told["step"] == BAD_STEP
        assert "Weights were NaN or Inf before that (0.weight)." in told["message"]

"""Gradients that a loop throws away, where several ranks share the parameters or the gradients."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import gradwatch
from tests.support import zoo
from tests.support.launch import on_ranks

RANKS, STEPS, BAD = 2, 8, (3, 6)


def _model(sharded):
    return zoo.small_sharded() if sharded else DistributedDataParallel(zoo.small())


def _guard(sharded, set_to_none):
    """Leaves a step out on all ranks where the loss is bad on one of them."""
    model = _model(sharded)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer) as watcher:
        for step in range(STEPS):
            seed = 100 * step + dist.get_rank()
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
            if step in BAD and dist.get_rank() == 1:
                x[0, 0] = math.nan
            optimizer.zero_grad(set_to_none)
            loss = model(x).square().mean()
            loss.backward()
            bad = torch.tensor(float(not math.isfinite(loss.item())))
            dist.all_reduce(bad)
            if not bad:
                optimizer.step()
    events = watcher.history.events()
    return {
        "steps": len(watcher.history),
        "discarded": watcher.history.steps()["discarded"].tolist(),
        "kinds": events["kind"].tolist(),
        "at": events["step"].tolist(),
    }


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_guard_under_ddp_leaves_a_record(set_to_none):
    """Each poisoned backward is an event on every rank, and no micro-batch of the next step."""
    for rank in on_ranks(_guard, RANKS, sharded=False, set_to_none=set_to_none):
        assert rank["steps"] == STEPS - len(BAD)
        assert rank["kinds"] == ["nan", "discarded"] * len(BAD)
        assert rank["at"] == [4, 4, 6, 6]
        assert rank["discarded"] == [0, 0, 0, 1, 0, 1]


@pytest.mark.skipif(torch.__version__ < "2.9", reason="FSDP2 on CPUs needs torch 2.9 or newer")
def test_a_guard_under_fsdp_leaves_a_record():
    """So it is where the parameters are sharded."""
    for rank in on_ranks(_guard, RANKS, sharded=True, set_to_none=True):
        assert rank["steps"] == STEPS - len(BAD)
        assert rank["kinds"] == ["nan", "discarded"] * len(BAD)
        assert rank["discarded"] == [0, 0, 0, 1, 0, 1]

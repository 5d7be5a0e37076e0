"""DistributedDataParallel in real processes: reduced norms, one decision, one writer."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import gradwatch
from gradwatch.testing import CapturingSink
from tests.support import float64, zoo
from tests.support.launch import on_ranks

RANKS, STEPS, POISONED = 2, 6, 3


def _batch(rank, step, micro_batch):
    seed = 100 * step + 10 * micro_batch + rank
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))


def _loss(model, rank, step, micro_batch):
    loss = model(_batch(rank, step, micro_batch)).square().mean()
    poisoned = (rank, step, micro_batch) == (1, POISONED, 1)
    return loss * math.nan if poisoned else loss


def _train(bucket_view):
    rank = dist.get_rank()
    model = DistributedDataParallel(zoo.small(), gradient_as_bucket_view=bucket_view)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sink = CapturingSink()
    with gradwatch.watch(model, optimizer, on_nonfinite="skip", sinks=[sink]) as watcher:
        for step in range(STEPS):
            with model.no_sync():
                _loss(model, rank, step, 0).backward()
            _loss(model, rank, step, 1).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=step % 2 == 0)
    steps = watcher.history.steps()
    return {
        "norms": steps["grad_norm"].tolist(),
        "outcomes": steps["outcome"].tolist(),
        "micro_batches": steps["micro_batches"].tolist(),
        "names": sorted(set(watcher.history.parameters()["parameter"])),
        "written": len(sink.steps),
        "weights": [p.tolist() for p in model.parameters()],
    }


def _reference():
    """One process, float64: the mean over ranks of the sum over micro-batches; poison left out."""
    model = float64.widen_module(zoo.small())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    norms = []
    for step in range(STEPS):
        if step == POISONED:
            norms.append(math.nan)
            continue
        for rank in range(RANKS):
            for micro_batch in range(2):
                x = _batch(rank, step, micro_batch).double()
                (model(x).square().mean() / RANKS).backward()
        norms.append(float64.gradient_norm(model))
        optimizer.step()
        optimizer.zero_grad()
    return norms


@pytest.fixture(scope="module", params=[False, True], ids=["copied", "bucket_view"])
def ranks(request):
    """What each rank saw."""
    return on_ranks(_train, RANKS, bucket_view=request.param)


def test_norms_are_the_reduced_ones_on_every_rank(ranks):
    """Both ranks record the norm that one process with all the data has."""
    expected = pytest.approx(_reference(), rel=1e-4, nan_ok=True)
    assert ranks[0]["norms"] == expected
    assert ranks[1]["norms"] == expected


def test_ranks_skip_together(ranks):
    """One rank's NaN is every rank's skipped step, and the weights stay equal."""
    expected = ["skipped_nonfinite" if step == POISONED else "applied" for step in range(STEPS)]
    assert ranks[0]["outcomes"] == ranks[1]["outcomes"] == expected
    assert ranks[0]["weights"] == ranks[1]["weights"]


def test_accumulation_without_sync_is_counted(ranks):
    """Two backwards, of which one communicates, are two micro-batches."""
    assert ranks[0]["micro_batches"] == [2] * STEPS


def test_only_the_first_rank_writes(ranks):
    """Sinks of other ranks get nothing."""
    assert [seen["written"] for seen in ranks] == [STEPS, 0]


def test_names_are_those_of_the_users_model(ranks):
    """The wrapper's prefix is no part of a name."""
    assert ranks[0]["names"] == ["0.bias", "0.weight", "2.bias", "2.weight"]

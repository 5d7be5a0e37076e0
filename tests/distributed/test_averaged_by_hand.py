"""Loops that average gradients over the ranks themselves: the norms are those of what is stepped."""

import contextlib
import math

import pytest
import torch
import torch.distributed as dist

import gradwatch
from gradwatch.testing import late_readings
from tests.support import float64, zoo
from tests.support.launch import on_ranks

RANKS, STEPS, LIMIT = 2, 5, 0.1


def _loss(model, rank, step):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(10 * step + rank))
    return model(x.to(next(model.parameters()).dtype)).square().mean()


def _train(late, clip=None, own_clip=False):
    """Trains; `all_reduce(p.grad)` moves no version counter."""
    model = zoo.small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watcher = gradwatch.watch(model, optimizer, clip=clip)
    with late_readings(1) if late else contextlib.nullcontext(), watcher:
        for step in range(STEPS):
            optimizer.zero_grad()
            (_loss(model, dist.get_rank(), step) / RANKS).backward()
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
            if own_clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
            optimizer.step()
    events = watcher.history.events()
    steps = watcher.history.steps()
    return {
        "norms": steps["grad_norm"].tolist(),
        "clip_coef": steps["clip_coef"].tolist(),
        "events": events["kind"].tolist(),
        "weights": [p.tolist() for p in model.parameters()],
    }


def _reference(clips):
    """One process in float64, with the data of both ranks."""
    model = float64.widen_module(zoo.small())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(RANKS):
            (_loss(model, rank, step) / RANKS).backward()
        norms.append(float64.gradient_norm(model))
        if clips:
            torch.nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
        optimizer.step()
    return norms, [p.tolist() for p in model.parameters()]


def _all():
    return {
        "host": _train(False),
        "late": _train(True),
        "clip": _train(False, clip=LIMIT),
        "own_clip": _train(False, own_clip=True),
    }


@pytest.fixture(scope="module")
def ranks():
    """What each rank saw."""
    return on_ranks(_all, RANKS)


def test_norms_are_those_of_the_average(ranks):
    """In every step, with the numbers at hand and late; whether it clipped is not known."""
    norms, _ = _reference(clips=False)
    for seen in [of_rank[how] for of_rank in ranks for how in ("host", "late")]:
        assert seen["norms"] == pytest.approx(norms, rel=3e-4)
        assert all(map(math.isnan, seen["clip_coef"]))
        assert seen["events"] == []


def test_a_clip_takes_the_factor_of_the_average(ranks):
    """gradwatch's own clip is that of one process with the data of all ranks."""
    norms, weights = _reference(clips=True)
    factors = [min(1, LIMIT / one) for one in norms]
    for seen in [of_rank["clip"] for of_rank in ranks]:
        assert seen["norms"] == pytest.approx(norms, rel=3e-4)
        assert seen["clip_coef"] == pytest.approx(factors, rel=3e-4)
        for mine, right in zip(seen["weights"], weights, strict=True):
            assert torch.allclose(torch.tensor(mine).double(), torch.tensor(right).double(), 3e-4)


def test_what_the_loop_clips_itself_is_not_taken_for_a_norm_of_one_rank(ranks):
    """The norm before its clip is seen nowhere: that of the step is recorded."""
    norms, _ = _reference(clips=True)
    for seen in [of_rank["own_clip"] for of_rank in ranks]:
        assert seen["norms"] == pytest.approx([min(LIMIT, one) for one in norms], rel=3e-4)
        assert all(map(math.isnan, seen["clip_coef"]))

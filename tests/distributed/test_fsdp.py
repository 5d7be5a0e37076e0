"""FSDP in real processes: what is supported is right on every rank, what is not is refused."""

import contextlib
import math
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

import gradwatch
from gradwatch.testing import CapturingSink, late_readings
from tests.support import float64, zoo
from tests.support.launch import on_ranks

RANKS, STEPS, POISONED = 2, 4, 2

pytestmark = pytest.mark.skipif(
    torch.__version__ < "2.9", reason="FSDP2 on CPUs needs torch 2.9 or newer"
)


def _loss(model, step, micro_batch=0):
    seed = 100 * step + 10 * micro_batch + dist.get_rank()
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
    return model(x).square().mean()


def _steps(watcher):
    return watcher.history.steps().drop(columns="time_s").to_dict("list")


def _accumulate(late):
    """Trains with gradients that FSDP2 holds back; the second rank's last batch is bad once."""
    model = zoo.small_sharded()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sink = CapturingSink()
    watcher = gradwatch.watch(model, optimizer, clip=0.1, sinks=[sink])
    with late_readings(1) if late else contextlib.nullcontext(), watcher:
        for step in range(STEPS):
            for micro_batch in range(3):
                model.set_requires_gradient_sync(micro_batch == 2)
                (_loss(model, step, micro_batch) / 3).backward()
            optimizer.step()
            optimizer.zero_grad()
    return {"steps": _steps(watcher), "written": len(sink.steps), "scaled": late}


@pytest.fixture(scope="module")
def accumulated():
    """What each rank saw, with the numbers at hand and late."""
    return {late: on_ranks(_accumulate, RANKS, late=late) for late in (False, True)}


def test_micro_batches_that_are_held_back_are_counted(accumulated):
    """No parameter receives a gradient in them, and yet they are in the window."""
    assert accumulated[False][0]["steps"]["micro_batches"] == [3] * STEPS


def test_only_the_first_rank_writes(accumulated):
    """Sinks of other ranks get nothing."""
    assert [seen["written"] for seen in accumulated[False]] == [STEPS, 0]


def test_late_numbers_are_the_same(accumulated):
    """Where the numbers come late the ranks clip alike, and by the same factor."""
    for name in ("grad_norm", "clip_coef", "grad_norm_clipped", "outcome"):
        expected = accumulated[False][0]["steps"][name]
        for seen in (*accumulated[True], accumulated[False][1]):
            if name == "outcome":
                assert seen["steps"][name] == expected
            else:
                assert seen["steps"][name] == pytest.approx(expected, rel=1e-5)


def _poisoned():
    model = zoo.small_sharded()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with gradwatch.watch(model, optimizer, on_nonfinite="skip") as watcher:
        for step in range(STEPS):
            bad = (step, dist.get_rank()) == (POISONED, 1)
            (_loss(model, step) * (math.nan if bad else 1.0)).backward()
            optimizer.step()
            optimizer.zero_grad()
    finite = all(bool(torch.isfinite(p.to_local()).all()) for p in model.parameters())
    events = [(e.step, e.kind, e.parameter, e.nan_count) for e in watcher.events]
    return {"outcomes": _steps(watcher)["outcome"], "finite": finite, "events": events}


def test_one_ranks_nan_is_every_ranks_skip():
    """All ranks leave the step out, and all name the same parameter with the count of all parts."""
    first, second = on_ranks(_poisoned, RANKS)
    assert first == second
    assert first["finite"]
    assert first["outcomes"].count("skipped_nonfinite") == 1
    step, kind, parameter, count = first["events"][0]
    sizes = {"0.weight": 32, "0.bias": 8, "2.weight": 8, "2.bias": 1}
    assert (step, kind, count) == (POISONED + 1, "nan", sizes[parameter])


def _watched_after_a_forward():
    """The outermost module holds whole parameters after a forward without a backward."""
    model = zoo.small_sharded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.no_grad():
        _loss(model, 0)
    with gradwatch.watch(model, optimizer) as watcher:
        _loss(model, 1).backward()
        norm = float64.gradient_norm(model)
        optimizer.step()
    return watcher.last.grad_norm, norm


def test_a_forward_before_watching_does_no_harm():
    """The shards are put back, and the norm is the whole one."""
    for recorded, true in on_ranks(_watched_after_a_forward, RANKS):
        assert recorded == pytest.approx(true, rel=1e-6)


def _refusals():
    told = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.distributed.fsdp import FullyShardedDataParallel

        old = FullyShardedDataParallel(nn.Linear(4, 1), device_id=torch.device("cpu"))
    try:
        gradwatch.watch(old)
    except ValueError as error:
        told.append(str(error))
    model = zoo.small_sharded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        with gradwatch.watch(model, optimizer, clip=gradwatch.AdaptiveGradientClip()):
            _loss(model, 0).backward()
            optimizer.step()
    except NotImplementedError as error:
        told.append(str(error))
    return told


def test_what_cannot_be_right_is_refused():
    """FSDP1, and rules about whole output units of which each rank holds a part."""
    for told in on_ranks(_refusals, RANKS):
        assert len(told) == 2
        assert "fully_shard" in told[0]
        assert 'clip="auto"' in told[1]


def _grouped(late):
    """Two optimizers over sharded layers, the first with two groups; and what the norms must be."""
    model = zoo.small_sharded()
    weight, bias = model[0].weight, model[0].bias
    first = torch.optim.SGD([{"params": [weight], "lr": 0.1}, {"params": [bias], "lr": 0.2}])
    second = torch.optim.SGD(model[2].parameters(), lr=0.01)
    whole = []
    with (
        late_readings(1) if late else contextlib.nullcontext(),
        gradwatch.watch(model, {"a": first, "b": second}) as watcher,
    ):
        for step in range(STEPS):
            _loss(model, step).backward()
            parts = [[weight], [bias], list(model[2].parameters())]
            norms = [float64.gradient_norms(dict(enumerate(part))).values() for part in parts]
            whole.append([math.hypot(*one) for one in norms])
            for optimizer in (first, second):
                optimizer.step()
                optimizer.zero_grad()
    groups = watcher.history.groups()
    return {
        "whole": whole,
        "totals": watcher.history.steps()["grad_norm_all"].tolist(),
        "groups": groups["grad_norm"].tolist(),
        "rates": groups["lr"].tolist(),
    }


@pytest.mark.parametrize("late", [False, True], ids=["host", "late"])
def test_groups_and_totals_are_of_whole_gradients(late):
    """Norms of groups, and over all optimizers, are those of the whole gradients on every rank."""
    for seen in on_ranks(_grouped, RANKS, late=late):
        expected = [norm for step in seen["whole"] for norm in step]
        assert seen["groups"] == pytest.approx(expected, rel=1e-5)
        totals = [math.hypot(*step) for step in seen["whole"] for _ in range(2)]
        assert seen["totals"] == pytest.approx(totals, rel=1e-5)
        assert seen["rates"] == [0.1, 0.2, 0.01] * STEPS

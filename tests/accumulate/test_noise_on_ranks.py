"""The gradient noise scale over ranks: one number on all of them, against brute force."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import gradwatch
from tests.support.launch import on_ranks
from tests.support.noise import (
    KnownCovariance,
    Oracle,
    draws,
    examples,
    gradient_of,
    regression,
    regression_loss,
)

WINDOWS = 8


def _size(rank, window, index):
    """Examples of a micro-batch: other ones on each rank, in each window."""
    return 2 + (3 * rank + 5 * window + 7 * index) % 6


def _run_managed(micro_batches, bucket_view):
    rank = dist.get_rank()
    model = DistributedDataParallel(regression(), gradient_as_bucket_view=bucket_view)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gradwatch.watch(model, optimizer, accumulate=micro_batches) as watcher:
        for window in range(WINDOWS):
            for index in range(micro_batches):
                size = _size(rank, window, index)
                loss = regression_loss(model, examples(window, index, size, rank))
                watcher.backward(loss, weight=size)
                watcher.step()
    return watcher.noise_scale, watcher.history.steps()["weight"].tolist()


@pytest.mark.parametrize(
    ("ranks", "micro_batches", "bucket_view"),
    [(2, 1, False), (2, 3, False), (2, 2, True), (4, 2, False)],
)
def test_a_managed_loop_uses_the_micro_batches_of_all_ranks(ranks, micro_batches, bucket_view):
    """Unequal ones too, with one micro-batch per rank or several: every rank has the number of brute force."""
    told = on_ranks(_run_managed, ranks, micro_batches=micro_batches, bucket_view=bucket_view)
    model, oracle, weights = regression(), Oracle(), []
    for window in range(WINDOWS):
        places = [(rank, index) for rank in range(ranks) for index in range(micro_batches)]
        sizes = [_size(rank, window, index) for rank, index in places]
        batches = [
            examples(window, index, size, rank)
            for (rank, index), size in zip(places, sizes, strict=True)
        ]
        gradients = [gradient_of(model, lambda m, x=x: regression_loss(m, x)) for x in batches]
        oracle.add(list(zip(sizes, gradients, strict=True)))
        weights.append(float(sum(sizes)))
    assert all(noise == told[0][0] for noise, _ in told)
    assert told[0][1] == weights
    noise = told[0][0]
    assert noise.updates == WINDOWS
    assert (noise.tr_sigma, noise.grad_sq) == pytest.approx(oracle.means, rel=1e-9)


def _run_unmanaged(micro_batches, synchronised, bucket_view):
    rank = dist.get_rank()
    model = DistributedDataParallel(regression(), gradient_as_bucket_view=bucket_view)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gradwatch.watch(model, optimizer) as watcher:
        for window in range(WINDOWS):
            for index in range(micro_batches):
                model.require_backward_grad_sync = synchronised or index == micro_batches - 1
                loss = regression_loss(model, examples(window, index, 4, rank))
                (loss / micro_batches).backward()
            optimizer.step()
            optimizer.zero_grad()
    return watcher.noise_scale


def _mean_of_rank(model, rank, window, micro_batches):
    batches = [examples(window, index, 4, rank) for index in range(micro_batches)]
    return (
        sum(gradient_of(model, lambda m, x=x: regression_loss(m, x)) for x in batches)
        / micro_batches
    )


@pytest.mark.parametrize(("micro_batches", "bucket_view"), [(1, False), (3, False), (2, True)])
def test_a_loop_that_is_only_watched_compares_its_own_rank(micro_batches, bucket_view):
    """Without a collective: this rank's window against the mean over the ranks, as each of them sees it."""
    told = on_ranks(
        _run_unmanaged, 2, micro_batches=micro_batches, synchronised=False, bucket_view=bucket_view
    )
    model = regression()
    for rank, noise in enumerate(told):
        oracle = Oracle()
        for window in range(WINDOWS):
            means = [_mean_of_rank(model, r, window, micro_batches) for r in range(2)]
            small, large = (means[rank] ** 2).sum(), ((means[0] + means[1]) ** 2).sum() / 4
            k = micro_batches
            tr_sigma = (small - large) / (1 / k - 1 / (2 * k))
            oracle.terms.append((tr_sigma, 2 * large - small))
        assert noise.updates == WINDOWS
        assert (noise.tr_sigma, noise.grad_sq) == pytest.approx(oracle.means, rel=1e-9)
        assert noise.batch == 2 * micro_batches


def test_where_every_micro_batch_is_reduced_by_itself_the_reason_is_told():
    """No gradient is of one rank then; a loop that is only watched says so."""
    noise = on_ranks(_run_unmanaged, 2, micro_batches=2, synchronised=True, bucket_view=False)[0]
    assert noise.updates == 0
    assert "no_sync()" in noise.reason


def _run_sharded():
    from torch.distributed.fsdp import fully_shard

    model = regression()
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gradwatch.watch(model, optimizer, accumulate=2) as watcher:
        for index in range(4):
            watcher.backward(regression_loss(model, examples(0, index, 4, dist.get_rank())))
            watcher.step()
    return watcher.noise_scale, watcher.history.steps()["noise_scale"].tolist()


@pytest.mark.skipif(torch.__version__ < "2.9", reason="FSDP2 on CPUs needs torch 2.9")
def test_sharded_parameters_have_none():
    """FSDP2 keeps what a micro-batch adds to itself: there is no noise scale, and the reason is told."""
    for noise, column in on_ranks(_run_sharded, 2):
        assert "sharded" in noise.reason
        assert all(map(math.isnan, column))


def _follow(managed):
    """Trains on draws around a known gradient, with a noise scale of 7 micro-batches."""
    rank, size = dist.get_rank(), 4
    policy = gradwatch.AccumulateByNoiseScale(min=1, max=16, min_updates=20)
    draw = draws(noise_scale=7 * size, size=256, seed=rank)
    model = DistributedDataParallel(KnownCovariance(256))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    used = []
    with gradwatch.watch(model, optimizer, accumulate=policy) as watcher:
        for _ in range(120):
            used.append(watcher.accumulate)
            for index in range(watcher.accumulate):
                if managed:
                    watcher.backward(model(draw(size)))
                    continue
                model.require_backward_grad_sync = index == watcher.accumulate - 1
                (model(draw(size)) / watcher.accumulate).backward()
            if managed:
                assert watcher.step()
            else:
                optimizer.step()
                optimizer.zero_grad()
    changes = [event for event in watcher.events if event.kind == "accumulate"]
    return used, watcher.noise_scale, len(changes)


@pytest.mark.parametrize("managed", [True, False], ids=["managed", "own loop"])
def test_all_ranks_follow_the_noise_scale_together(managed):
    """The ranks have one number at every step, and it comes to the nearest to the truth: 4 on each rank."""
    told = on_ranks(_follow, 2, managed=managed)
    assert told[0] == told[1]
    used, noise, changes = told[0]
    assert used[0] == 1
    assert used[-1] == 4
    assert changes == 2
    assert noise.micro_batches == pytest.approx(3.5, rel=0.2)

"""Windows over ranks in loops that are the user's own, or that do not go to plan."""

import contextlib
import copy

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import gradwatch
from tests.support.calls import CountCalls
from tests.support.launch import on_ranks

from .test_accumulation import WANTED, Net, _at_once, _loss, _optimizer, _rows


def _own_loop():
    """A loop of the user's own: no_sync() for all micro-batches but the last."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    bare, flags, sent = Net(), [], []
    model, twin = DistributedDataParallel(copy.deepcopy(bare)), copy.deepcopy(bare)
    optimizer, by_hand = _optimizer(model, "sgd"), _optimizer(twin, "sgd")
    with gradwatch.watch(model, optimizer, accumulate=4) as watcher:
        for window in range(3):
            with CountCalls() as collectives:
                for m in range(4):
                    with model.no_sync() if m < 3 else contextlib.nullcontext():
                        loss = _loss(model, _rows(window, m, rank)) / 4
                        flags.append(model.require_backward_grad_sync)
                        loss.backward()
                optimizer.step()
            optimizer.zero_grad()
            sent.append(collectives.sent["allreduce"])
            for m in range(4):
                for r in range(ranks):
                    (_loss(twin, _rows(window, m, r)) / 4 / ranks).backward()
            by_hand.step()
            by_hand.zero_grad()
    found = {name: p.detach() for name, p in model.module.named_parameters()}
    expected = {name: p.detach() for name, p in twin.named_parameters()}
    counted = list(watcher.history.steps()["micro_batches"])
    return {"found": found, "expected": expected, "flags": flags, "sent": sent, "counted": counted}


def _left():
    """Closes in the middle of a window, and throws windows away."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    bare = Net()
    model = DistributedDataParallel(copy.deepcopy(bare))
    optimizer = _optimizer(model, "sgd")
    with gradwatch.watch(model, optimizer, accumulate=WANTED) as watcher:
        data = _rows(90, 0, rank)
        watcher.backward(_loss(model, data), weight=50)
        optimizer.zero_grad()  # thrown away
        for m in range(WANTED):
            data = _rows(0, m, rank)
            watcher.backward(_loss(model, data), weight=data[1].sum())
            stepped = watcher.step()
        weights = {name: p.detach().clone() for name, p in model.module.named_parameters()}
        _loss(model, data)  # a forward that is held back and has no backward
        held = model.require_backward_grad_sync
    expected = _at_once(bare, "sgd", (WANTED,), ranks)
    flags = (held, model.require_backward_grad_sync)
    last = (watcher.last.weight, watcher.last.loss)
    return {
        "found": weights,
        "expected": expected,
        "flags": flags,
        "stepped": stepped,
        "last": last,
    }


@pytest.fixture(scope="module")
def others():
    """What each of two ranks saw of loops that are not managed to the end."""
    return on_ranks(_both, 2)


def _both():
    return {"own": _own_loop(), "left": _left()}


def test_loops_with_no_sync_of_their_own_are_left_alone(others):
    """The user's flags are in force in every backward, and the weights are those of one process."""
    for seen in others:
        own = seen["own"]
        assert own["flags"] == [False, False, False, True] * 3
        assert own["counted"] == [4, 4, 4]
        assert own["sent"] == [1, 1, 1]
        torch.testing.assert_close(own["found"], own["expected"], rtol=1e-12, atol=1e-14)


def test_a_window_that_is_thrown_away_on_all_ranks(others):
    """After zero_grad() the window begins anew, weight and loss included."""
    for seen in others:
        left, expected = seen["left"], seen["left"]["expected"]
        assert left["stepped"] is True
        torch.testing.assert_close(left["found"], expected["weights"], rtol=1e-12, atol=1e-14)
        assert left["last"] == pytest.approx((expected["weight"][0], expected["losses"][0]))


def test_flags_after_a_run_that_ends_in_a_window(others):
    """A forward may be held back; the end of the run lets the wrapper communicate again."""
    assert all(seen["left"]["flags"] == (False, True) for seen in others)

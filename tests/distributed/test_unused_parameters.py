"""Parameters that a rank's backward does not reach, and another rank's does: they have a gradient."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradwatch
from tests.support.launch import on_ranks

RANKS, STEPS = 2, 25


class _Branches(nn.Module):
    """Each rank trains a branch of its own; nobody trains the third."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(6, 1) for _ in range(3))

    def forward(self, x, branch):
        return self.branches[branch](x)


def _train(set_to_none):
    torch.manual_seed(0)
    model = DistributedDataParallel(_Branches(), find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.watch(model, optimizer) as watcher:
        for _ in range(STEPS):
            optimizer.zero_grad(set_to_none=set_to_none)
            model(torch.randn(8, 6), dist.get_rank()).square().mean().backward()
            optimizer.step()
    events = watcher.history.events()
    found = watcher.history.report().findings
    return {
        "events": events[events["kind"] == "no_gradient"]["parameter"].tolist(),
        "found": [name for one in found for name in one.seen.parameters],
        "flow": watcher.history.flow()["no_gradient"].to_dict(),
    }


def _by_hand():
    """The loop makes the gradients that are missing and averages all."""
    model = _Branches()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.watch(model, optimizer) as watcher:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(8, 6), dist.get_rank()).square().mean().backward()
            for parameter in model.branches[:2].parameters():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
            optimizer.step()
    events = watcher.history.events()
    return events[events["kind"] == "no_gradient"]["parameter"].tolist()


def _all():
    return {"none": _train(True), "zero": _train(False), "by_hand": _by_hand()}


@pytest.fixture(scope="module")
def ranks():
    """What each rank saw."""
    return on_ranks(_all, RANKS)


UNUSED = ["branches.2.weight", "branches.2.bias"]


def test_only_what_no_rank_uses_has_no_gradient(ranks):
    """Not the branch of the other rank, whose gradient came with the reduction."""
    for seen in ranks:
        for how in ("none", "zero"):
            assert seen[how]["events"] == UNUSED, how
            assert set(seen[how]["found"]) == set(UNUSED), how


def test_the_flow_says_the_same(ranks):
    """The share of the steps in which a parameter had no gradient."""
    for seen in ranks:
        shares = seen["none"]["flow"]
        assert {name for name, share in shares.items() if share} == set(UNUSED)


def test_gradients_that_the_loop_averages_by_hand_count(ranks):
    """Also where this rank had none before."""
    for seen in ranks:
        assert seen["by_hand"] == UNUSED


class _TwoOutputs(nn.Module):
    """Returns a loss and an output that the loss leaves out, as language models do."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 3)

    def forward(self, x):
        output = self.body(x)
        return output.square().mean(), output


def _explained():
    torch.manual_seed(0)
    model = DistributedDataParallel(_TwoOutputs(), find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.watch(model, optimizer, explain=True) as watcher:
        for step in range(4):
            optimizer.zero_grad()
            loss, _ = model(torch.randn(8, 6) / (step != 2))
            loss.backward()
            optimizer.step()
    return watcher.history.steps()["micro_batches"].tolist(), len(watcher.explanations)


def test_an_output_without_a_gradient_is_no_obstacle_to_explaining():
    """DDP gives None to the hook of an output that the loss leaves out; the backward goes on."""
    for micro_batches, explanations in on_ranks(_explained, RANKS):
        assert micro_batches == [1, 1, 1, 1]
        assert explanations > 0

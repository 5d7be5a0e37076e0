"""Explanations on several ranks: the rank that was bad runs its batch again, and nobody waits for it."""

import inspect

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradwatch
from tests.support import zoo
from tests.support.launch import on_ranks
from tests.support.state import snapshot

RANKS, CULPRIT, BAD = 2, 1, 2


class Logarithm(nn.Module):
    """A linear layer behind a logarithm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return a number for each row."""
        return self.last(self.norm(x.log()))


LINE = inspect.getsourcelines(Logarithm.forward)[1] + 2


def _train(wraps: bool, **options):
    torch.manual_seed(0)
    inner = Logarithm()
    model = DistributedDataParallel(inner)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model if wraps else inner, optimizer, **options) as watcher:
        for step in (1, 2, 3):
            x = torch.rand(3, 4) + 0.1
            if step == BAD and dist.get_rank() == CULPRIT:
                x[2] = 0.0
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return watcher.explanations, snapshot(inner), torch.get_rng_state()


def _sharded():
    model = zoo.small_sharded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer, on_nonfinite="explain") as watcher:
        (model(torch.ones(3, 4)) * float("nan")).sum().backward()
        optimizer.step()
    return watcher.explanations


def _job():
    wrapped, inner = (_train(wraps, on_nonfinite="explain") for wraps in (True, False))
    return wrapped[0], inner[0], wrapped[1:], _train(True, on_nonfinite="skip")[1:], _sharded()


@pytest.fixture(scope="module")
def results():
    """What each rank has found."""
    return on_ranks(_job, RANKS)


def test_the_rank_that_was_bad_names_its_line(results):
    """Its own batch, whether the wrapper is watched or the model in it."""
    for found in results[CULPRIT][:2]:
        (one,) = found
        assert (one.step, one.rank, one.operation) == (BAD, CULPRIT, "log")
        assert (one.module, one.line, one.examples) == ("", LINE, (2,))


def test_the_other_rank_says_that_it_was_not_its_own(results):
    """It runs nothing again."""
    for found in results[1 - CULPRIT][:2]:
        (one,) = found
        assert one.origin == "not_found"
        assert "reduction over the ranks" in one.notes[0]


def test_training_is_that_of_a_plain_skip(results):
    """Weights, buffers and random states of each rank."""
    for _, _, (weights, states), (expected, skipped), _ in results:
        assert all(map(torch.equal, weights, expected))
        assert torch.equal(states, skipped)


def test_sharded_parameters_are_refused_with_a_reason(results):
    """FSDP2: every rank would have to take part."""
    for found in results:
        (one,) = found[-1]
        assert one.origin == "not_found"
        assert "FSDP2" in one.notes[0]

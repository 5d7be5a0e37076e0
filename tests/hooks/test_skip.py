"""Leaving a step out."""

import copy

import pytest
import torch
from torch import nn

from gradwatch.hooks.checkpoint import OptimizerCheckpoint
from gradwatch.hooks.optimizer import hide_gradients, restore_gradients


def _same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_hidden_gradients_leave_an_optimizer_as_it_was(kind, steps_before, fused):
    """A step without gradients changes no weight and no state, the first one included."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = kind([weight], lr=0.1, fused=fused)
    for _ in range(steps_before):
        weight.grad = torch.ones(3)
        optimizer.step()
    weight.grad = gradient = torch.full((3,), float("nan"))
    before = copy.deepcopy(optimizer.state_dict()), weight.detach().clone()
    hidden = hide_gradients([weight])
    optimizer.step()
    restore_gradients(hidden)
    assert _same(optimizer.state_dict(), before[0])
    assert torch.equal(weight, before[1])
    assert weight.grad is gradient


def test_checkpoint_restores_what_lbfgs_moved():
    """Weights and state after a restore are those before the step."""
    weight = nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = torch.optim.LBFGS([weight], max_iter=5)

    def closure():
        optimizer.zero_grad()
        loss = (weight**4).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    before = copy.deepcopy(optimizer.state_dict()), weight.detach().clone()
    checkpoint = OptimizerCheckpoint([optimizer])
    optimizer.step(closure)
    assert not torch.equal(weight, before[1])
    checkpoint.restore()
    assert torch.equal(weight, before[1])
    assert _same(optimizer.state_dict(), before[0])

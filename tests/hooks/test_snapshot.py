"""Whether gradients changed: replaced, written to, thrown away."""

import weakref

import pytest
import torch
from torch import nn

from gradwatch.hooks.snapshot import GradientSnapshot


@pytest.fixture
def weight():
    """A parameter with a gradient."""
    weight = nn.Parameter(torch.ones(3))
    weight.sum().backward()
    return weight


def test_matches_while_nothing_happens(weight):
    """Reading a gradient changes nothing."""
    snapshot = GradientSnapshot([weight.grad])
    weight.grad.norm()
    assert snapshot.matches([weight.grad])


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.grad.mul_(1.0),
        lambda w: torch._foreach_mul_([w.grad], 0.5),
        lambda w: nn.utils.clip_grad_norm_([w], 0.1),
        lambda w: nn.utils.clip_grad_value_([w], 0.1),
        lambda w: setattr(w, "grad", w.grad * 2),
        lambda w: w.sum().backward(),
    ],
    ids=["mul_", "foreach", "clip_norm", "clip_value", "replaced", "backward"],
)
def test_notices_a_change(weight, change):
    """Every way to change a gradient is noticed."""
    snapshot = GradientSnapshot([weight.grad])
    change(weight)
    assert not snapshot.matches([weight.grad])


def test_notices_that_gradients_came_or_went(weight):
    """Another number of gradients is a change."""
    snapshot = GradientSnapshot([weight.grad])
    assert not snapshot.matches([])
    assert not snapshot.matches([weight.grad, torch.ones(1)])


def test_keeps_no_gradient_alive(weight):
    """A snapshot does not hold the memory of a gradient."""
    reference = weakref.ref(weight.grad)
    snapshot = GradientSnapshot([weight.grad])
    weight.grad = None
    assert reference() is None
    assert not snapshot.matches([torch.ones(3)])


@pytest.mark.parametrize(("to_none", "discarded"), [(None, False), (True, True), (False, True)])
def test_tells_accumulation_from_zero_grad(weight, to_none, discarded):
    """Adding is no reset; zero_grad before the backward is, whichever way it zeroes."""
    snapshot = GradientSnapshot([weight.grad])
    if to_none is not None:
        torch.optim.SGD([weight], 0.1).zero_grad(set_to_none=to_none)
    weight.sum().backward()
    assert snapshot.was_discarded([weight.grad], [True]) is discarded


def test_a_gradient_that_did_not_grow_is_no_evidence(weight):
    """Only what the backward added to can tell of a reset."""
    snapshot = GradientSnapshot([weight.grad])
    weight.grad = None
    assert not snapshot.was_discarded([None], [False])


def _in_one_tensor(loops):
    """Three parameters whose gradients are parts of one tensor, after so many backwards."""
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    for _ in range(loops):
        torch.cat(parameters).sum().backward()
    return parameters


def test_gradients_that_share_a_counter_are_not_taken_for_discarded():
    """torch.cat leaves gradients that are parts of one tensor: each addition moves the counter of all."""
    parameters = _in_one_tensor(1)
    snapshot = GradientSnapshot([p.grad for p in parameters])
    torch.cat(parameters).sum().backward()
    assert not snapshot.was_discarded([p.grad for p in parameters], [True] * 3)


def test_zeroed_gradients_that_share_a_counter_are_discarded():
    """zero_grad(set_to_none=False) on them is noticed all the same."""
    parameters = _in_one_tensor(2)
    snapshot = GradientSnapshot([p.grad for p in parameters])
    torch.optim.SGD(parameters).zero_grad(set_to_none=False)
    torch.cat(parameters).sum().backward()
    assert snapshot.was_discarded([p.grad for p in parameters], [True] * 3)

"""The comparison that the neutral trainings rest on sees one bit, wherever it is."""

import random

import numpy as np
import pytest
import torch

from tests.support.state import differences, state_of

from .loop import Loop


def _flip_a_bit(tensor):
    tensor.detach().view(torch.uint8).view(-1)[0] ^= 1


def _flip_a_gradient(loop):
    _flip_a_bit(loop.model[1].weight.grad)


def _flip_a_moment(loop):
    _flip_a_bit(loop.optimizer.state[loop.model[1].weight]["exp_avg"])


CHANGES = {
    "parameters": lambda loop: _flip_a_bit(loop.model[1].weight),
    "gradients": _flip_a_gradient,
    "buffers": lambda loop: _flip_a_bit(loop.model[2].running_mean),
    "optimizers": _flip_a_moment,
    "versions": lambda loop: loop.model[1].weight.grad.mul_(1.0),
    "requires_grad": lambda loop: loop.model[1].weight.requires_grad_(False),
    "training": lambda loop: loop.model[2].eval(),
    "random/torch": lambda loop: torch.rand(1),
    "random/python": lambda loop: random.random(),
    "random/numpy": lambda loop: np.random.rand(),
}


def _trained():
    loop = Loop({"model": "cnn", "optimizer": "Adam"}, watched=False)
    return loop, loop.run(3)


def test_two_trainings_are_alike():
    """Training twice from the same seed gives the same state."""
    assert list(differences(_trained()[1], _trained()[1])) == []


@pytest.mark.parametrize("where", CHANGES)
def test_a_change_is_found_where_it_is(where):
    """A flipped bit, a write that changes nothing or a drawn number is told with its place."""
    loop, before = _trained()
    CHANGES[where](loop)
    found = list(differences(before, state_of(loop.model, loop.optimizer)))
    assert found
    assert any(text.startswith(f"/{where}") for text in found)


def test_a_watcher_that_acts_is_told_apart():
    """A watcher that clips leaves another state than none: the trainings would show it."""
    clipped = Loop({}, watched=True, clip=0.01)
    assert list(differences(Loop({}, watched=False).run(3), clipped.run(3)))

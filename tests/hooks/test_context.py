"""ForwardContext: what is noted before a forward, what it costs, and how it is set again."""

import random
import sys

import numpy as np
import pytest
import torch

from gradwatch.hooks.context import ForwardContext, is_replaying, replaying
from gradwatch.hooks.generators import RandomState
from tests.support.calls import CountCalls
from tests.support.state import differences, pieces

MOST_FRAMES = 4  # now(), RandomState(), the list of generators, and a comprehension up to 3.11


def _states():
    return pieces([torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)])


def _draw(kind):
    drawn = {
        "torch": lambda: torch.rand(2),
        "python": random.random,
        "gauss": lambda: random.gauss(0, 1),
        "numpy": np.random.rand,
        "normal": np.random.randn,
        "seeds": lambda: (random.seed(3), np.random.seed(3), torch.manual_seed(3)),
        "none": lambda: None,
    }
    return drawn[kind]()


@pytest.mark.parametrize("first", ["torch", "python", "gauss", "numpy", "normal", "seeds", "none"])
@pytest.mark.parametrize("second", ["torch", "python", "gauss", "numpy", "normal", "none"])
def test_the_random_states_are_those_of_the_moment(first, second):
    """Whatever was drawn since the state before, and also a normal number that is kept for later."""
    _draw("seeds")
    RandomState()
    _draw(first)
    one, then = RandomState(), _states()
    _draw(second)
    two, now = RandomState(), _states()
    for state, expected in ((one, then), (two, now), (one, then)):
        state.put_back()
        assert list(differences(expected, _states())) == []


def test_another_bit_generator_of_numpy():
    """A global generator of another kind is noted as well."""
    before = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(3))
        state = RandomState()
        drawn = np.random.rand()
        state.put_back()
        assert np.random.rand() == drawn
    finally:
        np.random.set_bit_generator(before)
    state = RandomState()
    drawn = np.random.rand()
    state.put_back()
    assert np.random.rand() == drawn


def _frames(function):
    frames = []
    sys.setprofile(lambda frame, event, _: frames.append(frame) if event == "call" else None)
    try:
        function()
    finally:
        sys.setprofile(None)
    return len(frames)


def test_what_it_costs():
    """No operation of torch, and a few frames, if nothing but torch's generator was drawn from."""
    ForwardContext.now()
    torch.rand(2)
    with CountCalls() as count:
        ForwardContext.now()
    assert count.calls == {}
    assert _frames(ForwardContext.now) <= MOST_FRAMES


def test_entering_sets_the_state_and_leaving_restores_it():
    """Random numbers, autocast, grad and inference mode are those of the moment that was noted."""
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), torch.no_grad():
        context = ForwardContext.now()
        expected = torch.rand(3), random.random(), float(np.random.rand())
    before = _states()
    drawn = []
    with pytest.raises(ValueError, match="inside"):
        _fail_inside(context, drawn)
    assert list(differences(pieces(expected), pieces(drawn[0]))) == []
    assert list(differences(before, _states())) == []
    assert not torch.is_autocast_enabled("cpu")
    assert torch.is_autocast_cache_enabled()
    assert torch.is_grad_enabled()


def _fail_inside(context, drawn):
    with context.entered():
        assert torch.is_autocast_enabled("cpu")
        assert not torch.is_autocast_cache_enabled()
        assert torch.get_autocast_dtype("cpu") is torch.bfloat16
        assert not torch.is_grad_enabled()
        drawn.append((torch.rand(3), random.random(), float(np.random.rand())))
        raise ValueError("inside")


def test_entering_turns_off_what_was_off():
    """An autocast, no_grad and inference mode around it are not active in it."""
    context = ForwardContext.now()
    with torch.autocast("cpu", torch.float16), torch.inference_mode(), context.entered():
        assert not torch.is_autocast_enabled("cpu")
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_the_inference_mode_is_noted():
    """A forward in inference mode runs again in inference mode."""
    with torch.inference_mode():
        context = ForwardContext.now()
    with context.entered():
        assert torch.is_inference_mode_enabled()


def test_replays_may_be_nested():
    """The flag is set until the outer one ends."""
    with replaying():
        with replaying():
            assert is_replaying()
        assert is_replaying()
    assert not is_replaying()

"""SpikeRule: its formula, and that it neither locks in nor waits."""

import copy
import json
import math
import pickle
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch.clip.spikes import SpikeRule
from gradwatch.testing import late_readings
from tests.clip.test_policies import ANY_NORM
from tests.support.calls import CountCalls

SEEDS = range(5)


def _spikes(rule, norms):
    return [rule.is_spike(torch.tensor(norm, dtype=torch.float64)).item() for norm in norms]


def _steady(seed, spread, length):
    return np.random.default_rng(seed).lognormal(0, spread, length)


def _oracle(norms, z):
    spikes = []
    for step, norm in enumerate(norms):
        history = norms[max(0, step - 128) : step]
        median = np.median(history) if len(history) else math.nan
        deviation = 1.4826 * np.median(np.abs(history - median)) if len(history) else math.nan
        limit = median + z * max(deviation, 0.05 * median)
        spikes.append(len(history) >= 25 and norm > limit)
    return spikes


@pytest.mark.parametrize("z", ["auto", 6, 2.5])
@pytest.mark.parametrize("late", [False, True])
def test_formula(z, late):
    """A spike lies z robust deviations above the median of the last 128."""
    norms = _steady(0, 0.3, 400)
    norms[[10, 60, 61, 200]] *= [50, 20, 4, 1e6]
    norms[300:] = 1.0
    with late_readings() if late else nullcontext():
        found = _spikes(SpikeRule(z), norms)
    assert found == _oracle(norms, 6.0 if z == "auto" else z)


@pytest.mark.parametrize("spread", [0.01, 0.15, 0.3])
def test_false_spikes(spread):
    """Of steady norms next to none are skipped."""
    rates = [np.mean(_spikes(SpikeRule(), _steady(seed, spread, 4000))) for seed in SEEDS]
    assert max(rates) < 0.002


@pytest.mark.parametrize("rise", [1.5, 2.0, 3.0, 5.0, 10.0, 1e6])
@pytest.mark.parametrize("spread", [0.001, 0.15])
def test_a_lasting_rise_is_accepted(rise, spread):
    """At most 64 steps after a lasting rise, no step is a spike any more."""
    for seed in SEEDS:
        norms = _steady(seed, spread, 400)
        norms[200:] *= rise
        spikes = np.flatnonzero(_spikes(SpikeRule(), norms)[200:])
        print(f"rise {rise:g}, spread {spread}: {len(spikes)} spikes")
        assert max(spikes, default=0) <= 64


def test_a_burst_is_skipped_to_its_end():
    """All twenty steps of a burst are spikes, and none after it."""
    for seed in SEEDS:
        norms = _steady(seed, 0.15, 300)
        norms[150:170] *= 30
        assert np.flatnonzero(_spikes(SpikeRule(), norms)).tolist() == list(range(150, 170))


@pytest.mark.parametrize("scale", [100.0, 1e-6, 1e-20])
def test_scale_changes_no_verdict(scale):
    """The loss multiplied by any number, the same steps are spikes."""
    norms = _steady(1, 0.15, 300)
    norms[[50, 100]] *= [1.8, 9]
    assert _spikes(SpikeRule(), norms * scale) == _spikes(SpikeRule(), norms)


@pytest.mark.parametrize("late", [False, True])
@settings(max_examples=40, deadline=None)
@given(norms=st.lists(ANY_NORM, min_size=1, max_size=60), data=st.data())
def test_resumes(late, norms, data):
    """Stopped and restored at any step, its verdicts are those of one that was not."""
    norms = [*_steady(0, 0.1, 20).tolist(), *norms]
    stop = data.draw(st.integers(0, len(norms)))
    with late_readings() if late else nullcontext():
        first, second = SpikeRule(3.0), SpikeRule(3.0)
        expected = _spikes(SpikeRule(3.0), norms)
        _spikes(first, norms[:stop])
        second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
        assert _spikes(second, norms[stop:]) == expected[stop:]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("strange", [math.nan, math.inf, -math.inf, 0.0])
def test_one_strange_norm_changes_nothing(late, strange):
    """A norm that is zero or not finite is no spike and changes no later verdict."""
    norms = _steady(2, 0.15, 200).tolist()
    norms[100] = 9.0
    with late_readings() if late else nullcontext():
        expected = _spikes(SpikeRule(), norms)
        verdicts = _spikes(SpikeRule(), [*norms[:60], strange, *norms[60:]])
    assert verdicts == [*expected[:60], False, *expected[60:]]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda rule: pickle.loads(pickle.dumps(rule))])
def test_goes_to_another_process(copied):
    """A copy, pickled or deep, judges as the original and does not share its memory."""
    rule, norms = SpikeRule(2.0), _steady(3, 0.15, 100)
    _spikes(rule, norms[:50])
    twin = copied(rule)
    assert _spikes(twin, norms[50:]) == _spikes(rule, norms[50:])


def test_never_waits():
    """Where the norm is not at hand, no number is asked for."""
    norms = [torch.tensor(norm) for norm in _steady(4, 0.15, 60)]
    rule = SpikeRule()
    with late_readings(), CountCalls() as counter:
        verdicts = [rule.is_spike(norm) for norm in norms]
    assert counter.waits == 0
    assert {(verdict.dtype, verdict.shape) for verdict in verdicts} == {(torch.bool, ())}


@pytest.mark.parametrize(
    ("z", "error"), [(0, ValueError), ("on", ValueError), (math.nan, ValueError), (True, TypeError)]
)
def test_bad_arguments_are_named(z, error):
    """The message names skip_spikes and the value."""
    with pytest.raises(error, match=f"skip_spikes must be .*got {z!r}"):
        SpikeRule(z)

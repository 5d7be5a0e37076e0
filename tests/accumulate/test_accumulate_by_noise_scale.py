"""The controller on simulated gradients whose noise scale is known, and its rules one by one."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch.accumulate.noise_scale import NoiseScale, NoiseScaleEstimator, noise_terms
from gradwatch.accumulate.policies import AccumulateByNoiseScale

SIZE = 8  # examples in a micro-batch


def _simulate(b_simple, policy, steps, dimension=128, seed=0, signal=1.0):
    """Trains on gradients of a known noise scale; returns the micro-batches of each step."""
    rng, estimator, chosen = np.random.default_rng(seed), NoiseScaleEstimator(), []
    spectrum = 1 / np.arange(1, dimension + 1)
    deviation = np.sqrt(spectrum / spectrum.sum() / SIZE)
    gradient = rng.standard_normal(dimension)
    gradient *= math.sqrt(signal) / np.linalg.norm(gradient)
    for step in range(steps):
        k = policy.decide(step, estimator.read())
        noise = rng.standard_normal((k, dimension), dtype=np.float32)
        micro = gradient + noise * (deviation * math.sqrt(b_simple(step)))
        small_sq, big_sq = (micro**2).sum() / k, (micro.mean(0) ** 2).sum()
        terms = noise_terms(float(small_sq), SIZE, float(big_sq), SIZE * k)
        estimator.update(*terms, SIZE * k, SIZE)
        chosen.append(k)
    return np.array(chosen)


def _changes(chosen):
    return int((np.diff(chosen) != 0).sum())


def _seen(micro_batches, *, valid=True, updates=100, significance=10.0, batch=16.0):
    """An estimate as the estimator would give it."""
    size = SIZE * micro_batches
    usable = valid and 0 < micro_batches < math.inf
    return NoiseScale(
        b_simple=size,
        tr_sigma=size,
        grad_sq=1.0,
        stderr=1.0,
        valid=valid,
        updates=updates,
        suggested_micro_batches=max(1, 2 ** round(math.log2(micro_batches))) if usable else None,
        micro_batches=micro_batches,
        significance=significance,
        batch=batch,
    )


def _decide(policy, noises, first=10, every=10):
    return [policy.decide(first + i * every, noise) for i, noise in enumerate(noises)]


def test_a_rising_noise_scale_is_followed():
    """From 8 to 512 in 3,000 steps takes about five doublings, and never is off by more than 2."""
    steps, policy = 3000, AccumulateByNoiseScale(2, 64)
    chosen = _simulate(lambda step: 8 * 64 ** (step / steps), policy, steps, dimension=512)
    ideal = np.clip(64 ** (np.arange(steps) / steps), 2, 64)
    error = np.log2(chosen / ideal)
    assert 5 <= _changes(chosen) <= 7
    assert abs(error).mean() < 0.4
    assert (abs(error) > 1).mean() < 0.02
    assert chosen[-1] == 64


def test_a_falling_noise_scale_is_followed():
    """When the noise scale falls the micro-batches get fewer again, down to the least."""
    policy = AccumulateByNoiseScale(2, 32, start=32)
    chosen = _simulate(lambda step: 256 / 64 ** (step / 1000), policy, 1000)
    assert 4 <= _changes(chosen) <= 6
    assert chosen[-1] == 2


@pytest.mark.parametrize("seed", range(5))
def test_pure_noise_changes_nothing(seed):
    """Where there is no gradient the least number stays, for 1,000 steps."""
    policy = AccumulateByNoiseScale()
    assert set(_simulate(lambda step: 16, policy, 1000, 32, seed, signal=0.0)) == {2}


def test_between_two_powers_it_does_not_flap():
    """A noise scale half way between 4 and 8 is not followed up and down by its own errors."""
    between = SIZE * 2**2.5
    calm, nervous = AccumulateByNoiseScale(), AccumulateByNoiseScale(hysteresis=1.0001)
    assert _changes(_simulate(lambda step: between, calm, 2000)) <= 4
    assert _changes(_simulate(lambda step: between, nervous, 2000)) > 10


def test_a_small_start_is_left_though_nothing_is_valid_there():
    """A noise scale of 20 batches is out of range, and still reached, by what is significant."""
    chosen = _simulate(lambda step: 2 * 20 * SIZE, AccumulateByNoiseScale(2, 64), 1500, seed=1)
    assert chosen[49] == 2
    assert chosen[-1] in (32, 64)


def test_it_goes_to_the_nearest_power_by_factors_of_two():
    """Each check doubles or halves at most, and stops at the power that is nearest."""
    policy = AccumulateByNoiseScale()
    assert _decide(policy, [_seen(14)] * 5) == [4, 8, 16, 16, 16]
    assert _decide(policy, [_seen(3.1)] * 3) == [8, 4, 4]


@pytest.mark.parametrize(("micro_batches", "then"), [(5.9, 4), (6.0, 8), (2.7, 4), (2.66, 2)])
def test_the_exact_number_is_what_hysteresis_looks_at(micro_batches, then):
    """From 4, it moves at 1.5 times the number or at a 1.5th of it, though 5.7 rounds to 8."""
    assert AccumulateByNoiseScale(start=4).decide(10, _seen(micro_batches)) == then


def test_the_bounds_hold():
    """Nothing goes above max or below min, also where hysteresis is wide."""
    policy = AccumulateByNoiseScale(4, 8, hysteresis=3)
    assert _decide(policy, [_seen(1000)] * 3) == [8, 8, 8]
    assert _decide(policy, [_seen(0.01)] * 3) == [4, 4, 4]
    assert policy.most == 8


def test_it_waits_for_fifty_windows_and_checks_every_ten_steps():
    """Before 50 windows, and off the tenth step, an estimate is not acted upon."""
    policy = AccumulateByNoiseScale()
    assert [step for step in range(31) if policy.looks_at(step)] == [10, 20, 30]
    assert policy.decide(10, _seen(16, updates=49)) == 2
    assert policy.decide(19, _seen(16)) == 2
    assert policy.decide(20, _seen(16, updates=50)) == 4


def test_what_is_not_valid_is_not_acted_upon():
    """An estimate that is not valid leaves the number, also where it is precise."""
    policy = AccumulateByNoiseScale(start=8)
    assert _decide(policy, [_seen(1, valid=False), _seen(7.9, valid=False)] * 3) == [8] * 6


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -3.0])
@pytest.mark.parametrize("valid", [True, False])
def test_no_number_is_not_acted_upon(bad, valid):
    """NaN, Inf and what is negative leave the number, whatever is claimed of them."""
    policy = AccumulateByNoiseScale(start=8)
    assert _decide(policy, [_seen(bad, valid=valid)] * 6) == [8] * 6


def test_out_of_range_three_times_in_a_row_doubles():
    """One check that finds otherwise starts the count again, as does a doubling."""
    far = _seen(1000, valid=False, significance=3.0)
    weak = _seen(1000, valid=False, significance=2.9)
    policy = AccumulateByNoiseScale()
    found = _decide(policy, [far, far, weak, far, far, far, far, far, far])
    assert found == [2, 2, 2, 2, 2, 4, 4, 4, 8]
    assert _decide(AccumulateByNoiseScale(), [weak] * 6) == [2] * 6


@pytest.mark.parametrize(
    ("scale_lr", "factors"), [(None, (1, 1)), ("sqrt", (2, 1)), ("linear", (4, 1))]
)
def test_the_learning_rate_follows_the_first_number(scale_lr, factors):
    """The factor is that of the batch since the start, to the power that was asked for."""
    policy = AccumulateByNoiseScale(start=4, scale_lr=scale_lr)
    assert policy.lr_factor == 1.0
    _decide(policy, [_seen(16)] * 2)
    assert policy.micro_batches == 16
    assert policy.lr_factor == factors[0]
    _decide(policy, [_seen(4)] * 2)
    assert policy.lr_factor == factors[1]


@given(
    numbers=st.lists(st.tuples(st.floats(), st.floats(), st.booleans()), max_size=40),
    bounds=st.tuples(st.integers(0, 6), st.integers(0, 6)).map(sorted),
)
@settings(max_examples=50, deadline=None)
def test_whatever_comes_it_stays_a_power_of_two_within_bounds(numbers, bounds):
    """No estimate leads out of the bounds, by more than a factor of two, or to an error."""
    low, high = (2**exponent for exponent in bounds)
    policy, last = AccumulateByNoiseScale(low, high), low
    for i, (ratio, significance, valid) in enumerate(numbers):
        noise = NoiseScale(ratio, 1.0, 1.0, 1.0, valid, 60, 4, "", ratio, significance, 16.0)
        now = policy.decide(10 * i + 10, noise)
        assert now & (now - 1) == 0
        assert low <= now <= high
        assert now in (last // 2, last, 2 * last)
        last = now


def test_a_restored_policy_goes_on_as_it_would_have():
    """The number, the first number and the checks in a row come back through JSON."""
    far = _seen(1000, valid=False)
    policy, restored = (AccumulateByNoiseScale(scale_lr="linear") for _ in range(2))
    _decide(policy, [far] * 5)
    restored.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    assert restored.micro_batches == policy.micro_batches == 4
    assert restored.lr_factor == 2.0
    assert restored.decide(100, far) == policy.decide(100, far) == 8


def test_a_state_is_taken_within_the_bounds():
    """A state of 32 in a policy of at most 8 gives 8."""
    large, small = AccumulateByNoiseScale(start=32), AccumulateByNoiseScale(max=8)
    small.load_state_dict(large.state_dict())
    assert small.micro_batches == 8


def test_repr_shows_the_arguments():
    """The repr is the call that makes it."""
    policy = AccumulateByNoiseScale(2, 8, scale_lr="sqrt")
    assert repr(policy) == (
        "AccumulateByNoiseScale(min=2, max=8, start=None, every=10, hysteresis=1.5, min_updates=50, "
        "scale_lr='sqrt')"
    )


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"min": 6}, ValueError, r"\(min=\) must be a power of two, got 6\. Write 4 or 8\."),
        ({"max": 100}, ValueError, r"\(max=\) must be a power of two, got 100\. Write 64 or 128\."),
        ({"start": 3}, ValueError, r"\(start=\) must be a power of two, got 3\. Write 2 or 4\."),
        ({"min": 0}, ValueError, r"\(min=\) must be at least 1, got 0\. Write 2"),
        ({"min": 2.0}, TypeError, r"\(min=\) must be an integer, a power of two, got 2\.0 of type float"),
        ({"max": True}, TypeError, r"\(max=\) must be an integer.*got True of type bool"),
        ({"min": 64}, ValueError, r"\(min=\) must be at most the max of 32, got 64\. Write a larger max"),
        ({"start": 64}, ValueError, r"\(start=\) must be between the min of 2 and the max of 32, got 64"),
        ({"every": 0}, ValueError, r"\(every=\) must be at least 1, got 0"),
        ({"every": 2.5}, TypeError, r"\(every=\) must be a whole number of steps, got 2\.5"),
        ({"hysteresis": 1.0}, ValueError, r"\(hysteresis=\) must be between 1 and inf, got 1\.0\. Write 1\.5"),
        ({"hysteresis": math.nan}, ValueError, r"\(hysteresis=\) must be between 1 and inf, got nan"),
        ({"min_updates": -1}, ValueError, r"\(min_updates=\) must be at least 1, got -1"),
        ({"scale_lr": "square"}, ValueError, r"\(scale_lr=\).* must be 'sqrt' or 'linear', got 'square'"),
        ({"scale_lr": 2}, TypeError, r"\(scale_lr=\).* must be 'sqrt' or 'linear', got 2 of type int"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(arguments, error, text):
    """Each error names the argument, the bound and the value, and what to write."""
    with pytest.raises(error, match=text):
        AccumulateByNoiseScale(**arguments)

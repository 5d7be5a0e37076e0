"""RobustClip, the rule of clip="auto": its formula, and what it promises on sequences of norms."""

import math

import numpy as np
import pytest
import torch

from gradwatch.clip.robust import RobustClip

SEEDS = range(5)
SPREADS = [0.05, 0.15, 0.3, 0.5]  # coefficients of variation of lognormal norms
RISES = [1.5, 2.0, 3.0, 5.0, 10.0, 1e6]


def _passed(norms, policy=None):
    """Returns the norms after the clip."""
    policy = policy or RobustClip()
    passed = []
    for norm in np.asarray(norms, dtype=np.float64):
        coefficient = policy.decide(torch.tensor(norm)).coefficient
        passed.append(norm if coefficient is None else coefficient.item() * norm)
    return np.array(passed)


def _steady(seed, spread, length):
    sigma = math.sqrt(math.log(1 + spread**2))
    return np.random.default_rng(seed).lognormal(0, sigma, length)


def _autocorrelated(random, correlation, length=4000):
    noise, state = math.sqrt(1 - correlation**2), [random.standard_normal()]
    for _ in range(length - 1):
        state.append(correlation * state[-1] + noise * random.standard_normal())
    return np.array(state)


def _oracle(norms, z_thresh=3.0, window=64, warmup=25):
    """The rule with NumPy's medians over slices of the whole sequence."""
    passed = []
    for step, norm in enumerate(norms):
        history = np.log(norms[max(0, step - window) : step])
        if len(history) < 3:
            passed.append(norm)
            continue
        median = np.median(history)
        above = math.log(norm) - median
        deviation = 1.4826 * np.median(np.abs(history - median))
        passing = min(z_thresh * max(deviation, 0.05), math.log(8))
        if len(history) < warmup:
            passed.append(math.exp(median) if above > math.log(4) else norm)
        elif above > passing:
            passed.append(math.exp(median + passing**3 / above**2))
        else:
            passed.append(norm)
    return passed


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("settings", [(), (2.0, 9, 5), (4.5, 128, 100)])
def test_formula(seed, settings):
    """What passes is what the formula says, in every phase."""
    random = np.random.default_rng(seed)
    norms = random.lognormal(0, random.choice([0.001, 0.15, 0.6]), 400)
    norms[random.integers(0, 400, 20)] *= 10 ** random.uniform(-4, 4, 20)
    norms[300:] *= 5
    expected = _oracle(norms, *settings)
    np.testing.assert_allclose(_passed(norms, RobustClip(*settings)), expected, rtol=1e-9)


@pytest.mark.parametrize("spread", SPREADS)
def test_false_clips(spread):
    """Of steady lognormal norms, however spread, less than one in a hundred is clipped."""
    rates = [(_passed(n := _steady(s, spread, 4000)) < n).mean() for s in SEEDS]
    print(
        f"spread {spread}: false clips {100 * np.mean(rates):.2f} %, worst {100 * max(rates):.2f} %"
    )
    assert max(rates) < 0.01


@pytest.mark.parametrize(
    ("kind", "draw"),
    [
        ("gamma", lambda r: r.gamma(4.0, 1.0, 4000)),
        ("exponential", lambda r: r.exponential(1.0, 4000)),
        ("lognormal, spread 1", lambda r: r.lognormal(0, 0.83, 4000)),
        ("log of Student's t with 3 degrees", lambda r: np.exp(0.15 * r.standard_t(3, 4000))),
        ("two alternating tasks", lambda r: np.tile([1.0, 3.0], 2000) * r.lognormal(0, 0.15, 4000)),
        ("autocorrelated over 10 steps", lambda r: np.exp(0.15 * _autocorrelated(r, 0.9))),
        ("autocorrelated over 50 steps", lambda r: np.exp(0.3 * _autocorrelated(r, 0.98))),
    ],
)
def test_false_clips_of_other_norms(kind, draw):
    """Nor is it more than three in a hundred with heavy tails, or with norms that wander."""
    norms = [draw(np.random.default_rng(seed)) for seed in SEEDS]
    rates = [(_passed(one) < one).mean() for one in norms]
    print(f"{kind}: false clips {100 * np.mean(rates):.2f} %, worst {100 * max(rates):.2f} %")
    assert np.mean(rates) < 0.03


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("rise", RISES)
def test_recovers_from_a_lasting_rise(spread, rise):
    """Fifty steps after a lasting rise, however high, it clips no more than before."""
    last, rates = [], []
    for seed in SEEDS:
        norms = _steady(seed, spread, 700)
        norms[300:] *= rise
        clipped = (_passed(norms) < norms)[300:]
        last.append(1 + max(np.flatnonzero(clipped[:50]), default=-1))
        rates.append(clipped[50:].mean())
    print(f"spread {spread}, rise {rise:g}: last clip after {sorted(last)} steps")
    assert np.mean(rates) < 0.01
    assert np.median(last) <= 40


@pytest.mark.parametrize("seed", SEEDS)
def test_spike_in_the_warm_up(seed):
    """A hundredfold norm at step 10 passes as the median, and hides no later spike."""
    norms = _steady(seed, 0.15, 100)
    norms[9] *= 100
    norms[60] = 10.0
    passed = _passed(norms)
    assert passed[9] == pytest.approx(np.median(norms[:9]))
    assert passed[60] < 1.25
    np.testing.assert_array_equal(passed[:9], norms[:9])


@pytest.mark.parametrize(("spread", "most"), [(0.05, 1.1), (0.15, 1.1), (0.3, 1.3), (0.5, 2.1)])
def test_spike(spread, most):
    """A tenfold norm after the warm-up passes as an ordinary one, a hundredfold as a smaller."""
    for spike, bound in ((10.0, most), (100.0, 1 + 0.5 * (most - 1))):
        passed = []
        for seed in SEEDS:
            norms = _steady(seed, spread, 200)
            norms[199] = spike
            passed.append(_passed(norms)[199])
        print(f"spread {spread}, spike {spike:g}: passes as {np.mean(passed):.3f}")
        assert np.mean(passed) < bound


@pytest.mark.parametrize(("spread", "most"), [(0.05, 1.1), (0.15, 1.4), (0.3, 3.0), (0.5, 7.0)])
def test_burst(spread, most):
    """Twenty norms of thirty times the usual are all clipped, and afterwards it clips as before."""
    largest = []
    for seed in SEEDS:
        norms = _steady(seed, spread, 500)
        norms[200:220] = 30.0
        passed = _passed(norms)
        largest.append(passed[200:220].max())
        assert (passed < norms)[220:].mean() < 0.03
    print(f"spread {spread}: of a burst of 30, at most {np.mean(largest):.2f} passes")
    assert np.mean(largest) < most


def test_decaying_norms():
    """While norms decay a thousandfold it clips next to nothing, and still sees a spike."""
    for seed in SEEDS:
        decay = np.exp(-np.arange(1400) / 200)
        norms = _steady(seed, 0.15, 1400) * decay
        norms[1390] = 10 * decay[1390]
        passed = _passed(norms)
        assert passed[1390] < 1.6 * decay[1390]
        assert (passed < norms).mean() < 0.01


@pytest.mark.parametrize("grows_by", [1.001, 1.01, 1.03])
def test_growing_norms(grows_by):
    """Norms that grow steadily, by up to three percent a step, are left alone."""
    norms = _steady(0, 0.15, 400) * grows_by ** np.arange(400)
    assert (_passed(norms) < norms).mean() < 0.02


def test_constant_norms():
    """Without any spread, rises by a tenth pass, and larger ones are accepted in half a window."""
    norms = np.concatenate((np.full(100, 1.0), np.full(50, 1.1), np.full(100, 2.0)))
    clipped = _passed(norms) < norms
    assert not clipped[:150].any()
    assert clipped[150]
    assert not clipped[150 + 33 :].any()


def test_reports_its_limit():
    """The threshold is NaN for three steps, then what would pass, or what was clipped to."""
    policy, norms = RobustClip(), torch.tensor([1.0, 1.0, 1.0, 2.0, 40.0])
    thresholds = [policy.decide(norm).threshold for norm in norms]
    np.testing.assert_allclose(thresholds, [math.nan] * 3 + [4.0, 1.0])

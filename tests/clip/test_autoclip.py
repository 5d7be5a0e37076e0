"""AutoClip against NumPy's percentiles, and what its two variants clip."""

import math

import numpy as np
import pytest
import torch

from gradwatch.clip.autoclip import AutoClip


def _factors(policy, norms):
    factors = []
    for norm in norms:
        coefficient = policy.decide(torch.tensor(norm, dtype=torch.float64)).coefficient
        factors.append(1.0 if coefficient is None else coefficient.item())
    return np.array(factors)


def _oracle(norms, percentile, window, warmup, include_current):
    factors = []
    for step, norm in enumerate(norms):
        end = step + include_current
        history = norms[max(0, end - window) : end]
        enough = len(history) >= warmup
        limit = np.percentile(history, percentile) if enough else math.inf
        factors.append(min(1.0, limit / norm))
    return np.array(factors)


@pytest.mark.parametrize("percentile", [0.5, 10.0, 50, 90.0, 97.3])
@pytest.mark.parametrize(("window", "warmup"), [(1000, 5), (20, 1), (20, 20), (1, 1)])
@pytest.mark.parametrize("include_current", [False, True])
def test_limit_is_the_percentile(percentile, window, warmup, include_current):
    """The factor is that of NumPy's interpolated percentile over the last norms."""
    norms = np.random.default_rng(0).lognormal(0, 0.5, 200)
    policy = AutoClip(percentile, window, warmup, include_current)
    expected = _oracle(norms, percentile, window, warmup, include_current)
    np.testing.assert_allclose(_factors(policy, norms.tolist()), expected, rtol=1e-12)


def test_the_papers_rule():
    """The 10th percentile of all norms so far, the present one included, clips nine in ten."""
    norms = np.random.default_rng(1).lognormal(0, 0.15, 1000)
    policy = AutoClip(10, window=1_000_000, warmup=1, include_current=True)
    factors = _factors(policy, norms.tolist())
    expected = [min(1.0, np.percentile(norms[: i + 1], 10) / n) for i, n in enumerate(norms)]
    np.testing.assert_allclose(factors, expected, rtol=1e-12)
    assert 0.88 < (factors < 1).mean() < 0.92


def test_the_default_clips_one_in_ten():
    """By default about a tenth of steady norms are clipped, and a spike after the fifth is."""
    norms = np.random.default_rng(2).lognormal(0, 0.15, 3000)
    norms[5] = 100.0
    factors = _factors(AutoClip(), norms.tolist())
    assert 0.08 < (factors < 1).mean() < 0.12
    assert factors[5] < 0.02


def test_reports_its_limit():
    """The threshold is the percentile, NaN before the warm-up is over."""
    policy = AutoClip(50, warmup=2)
    thresholds = [policy.decide(torch.tensor(norm)).threshold for norm in (1.0, 3.0, 5.0, 1.0)]
    np.testing.assert_array_equal(thresholds, [math.nan, math.nan, 2.0, 3.0])


def test_a_shorter_window_takes_the_newest():
    """A state loaded into a shorter window keeps the newest norms."""
    long, short = AutoClip(50, window=10, warmup=1), AutoClip(50, window=3, warmup=1)
    _factors(long, [9.0, 9.0, 9.0, 1.0, 2.0, 3.0])
    short.load_state_dict(long.state_dict())
    assert short.state_dict() == {"window": [1.0, 2.0, 3.0]}
    assert short.decide(torch.tensor(4.0)).threshold == 2.0

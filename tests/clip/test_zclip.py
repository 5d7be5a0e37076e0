"""ZClip against its formulas, as published and winsorized."""

import math

import numpy as np
import pytest
import torch

from gradwatch.clip.zclip import ZClip


def _run(policy, norms):
    factors, limits = [], []
    for norm in norms:
        decision = policy.decide(torch.tensor(norm, dtype=torch.float64))
        factors.append(1.0 if decision.coefficient is None else decision.coefficient.item())
        limits.append(decision.threshold)
    return np.array(factors), np.array(limits)


def _published(norms, alpha, z_thresh, warmup, max_norm=None, eps=1e-6):
    """ZClip as in its authors' words: variances, the clipped norm enters, an absolute epsilon."""
    factors, mean, variance = [], math.nan, math.nan
    for step, norm in enumerate(norms):
        limit = math.inf
        if step >= warmup:
            deviation = variance**0.5
            z = (norm - mean) / (deviation + eps)
            if z > z_thresh:
                limit = mean + z_thresh * deviation / (z / z_thresh)
            entering = min(norm, limit)
            mean = alpha * mean + (1 - alpha) * entering
            variance = alpha * variance + (1 - alpha) * (entering - mean) ** 2
        elif step == warmup - 1:
            mean, variance = np.mean(norms[:warmup]), np.var(norms[:warmup])
        if max_norm is not None:
            limit = min(limit, max_norm)
        factors.append(min(1.0, limit / norm))
    return np.array(factors)


def _winsorized(norms, alpha, z_thresh, warmup):
    factors, mean, variance = [], math.nan, math.nan
    for step, norm in enumerate(norms):
        if step < warmup:
            factors.append(1.0)
            mean, variance = np.mean(norms[: step + 1]), np.var(norms[: step + 1])
            continue
        deviation = max(math.sqrt(variance), 0.01 * mean)
        z = (norm - mean) / deviation
        spike = z > z_thresh
        factors.append((mean + z_thresh**2 * deviation / z) / norm if spike else 1.0)
        entering = mean + z_thresh * deviation if spike else norm
        mean = alpha * mean + (1 - alpha) * entering
        variance = alpha * variance + (1 - alpha) * (entering - mean) ** 2
    return np.array(factors)


def _norms(seed, rise=1.0):
    random = np.random.default_rng(seed)
    norms = random.lognormal(0, 0.15, 600)
    norms[[40, 41, 90]] *= [30.0, 4.0, 0.01]
    norms[200:] *= rise
    return norms.tolist()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rise", [1.0, 3.0, 0.1])
@pytest.mark.parametrize(("alpha", "z_thresh", "warmup"), [(0.97, 2.5, 25), (0.9, 1.5, 4)])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_published_rule(seed, rise, alpha, z_thresh, warmup, max_norm):
    """With update="clipped" the factors are the published ones, but for the epsilon."""
    norms = _norms(seed, rise)
    policy = ZClip(alpha, z_thresh, warmup, max_norm, update="clipped")
    factors, _ = _run(policy, norms)
    exact = _published(norms, alpha, z_thresh, warmup, max_norm, eps=0.0)
    np.testing.assert_allclose(factors, exact, rtol=1e-4)
    with_epsilon = _published(norms, alpha, z_thresh, warmup, max_norm)
    np.testing.assert_allclose(factors, with_epsilon, rtol=1e-3)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rise", [1.0, 3.0, 0.1])
@pytest.mark.parametrize(("alpha", "z_thresh", "warmup"), [(0.97, 2.5, 25), (0.9, 1.5, 4)])
def test_winsorized_rule(seed, rise, alpha, z_thresh, warmup):
    """With update="winsorized" the largest norm that passes enters in place of a clipped one."""
    norms = _norms(seed, rise)
    factors, _ = _run(ZClip(alpha, z_thresh, warmup), norms)
    np.testing.assert_allclose(factors, _winsorized(norms, alpha, z_thresh, warmup), rtol=1e-9)


def test_published_rule_locks_in():
    """After a lasting rise by three ZClip as published clips for ever; winsorized, it stops."""
    norms = _norms(0, rise=3.0)
    published, _ = _run(ZClip(update="clipped"), norms)
    winsorized, _ = _run(ZClip(), norms)
    assert (published[250:] < 1).mean() > 0.9
    assert (winsorized[250:] < 1).mean() < 0.03


def test_constant_norms_do_not_lock_it():
    """Without any spread, the winsorized rule still follows a rise of a tenth."""
    factors, _ = _run(ZClip(warmup_steps=5), [1.0] * 50 + [1.1] * 100)
    assert factors[50] < 1
    assert set(factors[100:]) == {1.0}


def test_max_norm_holds_in_the_warm_up():
    """The fixed limit is there from the first step, and is reported."""
    factors, limits = _run(ZClip(max_norm=2.0), [1.0, 8.0])
    np.testing.assert_allclose(factors, [1.0, 0.25])
    np.testing.assert_array_equal(limits, [2.0, 2.0])


def test_reports_its_limit():
    """The threshold is NaN in the warm-up, then mean plus z_t deviations, or what it clipped to."""
    norms = [0.9, 1.1, 0.9, 1.1]
    _, limits = _run(ZClip(warmup_steps=4), [*norms, 1.0])
    np.testing.assert_allclose(limits, [math.nan] * 4 + [1.25])
    factors, limits = _run(ZClip(warmup_steps=4), [*norms, 11.0])
    np.testing.assert_allclose(limits[-1], 1 + 0.1 * 2.5**2 / 100)
    np.testing.assert_allclose(factors[-1] * 11.0, limits[-1])

"""AdaGC against its formulas, in the warm-up and after."""

import math

import numpy as np
import pytest
import torch

from gradwatch.clip.adagc import AdaGC


def _run(policy, rows):
    factors, limits = [], []
    for row in rows:
        decision = policy.decide(torch.tensor(row, dtype=torch.float64))
        ones = np.ones(len(row))
        factors.append(ones if decision.coefficient is None else decision.coefficient.numpy())
        limits.append(decision.threshold)
    return np.array(factors), np.array(limits)


def _oracle(rows, lambda_rel, beta, lambda_abs, warmup, norm_type=2.0):
    factors, average = [], np.full(len(rows[0]), math.inf)
    for step, norms in enumerate(rows):
        if step < warmup:
            h = np.full(len(norms), min(1.0, lambda_abs / np.linalg.norm(norms, norm_type)))
            average = np.minimum(average, h * norms)
        else:
            if step == 0:
                average = norms
            h = np.minimum(1.0, lambda_rel * average / norms)
            average = beta * average + (1 - beta) * h * norms
        factors.append(h)
    return np.array(factors)


@pytest.mark.parametrize(
    "settings",
    [(1.05, 0.98, 1.0, 100), (1.5, 0.9, 3.0, 10), (1.05, 0.98, math.inf, 20), (2.0, 0.5, 1.0, 0)],
)
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
def test_formula(settings, norm_type):
    """Global clipping with a running minimum, then each parameter by its own average."""
    rows = np.random.default_rng(0).lognormal(0, 0.4, (200, 6))
    rows[150, 2] *= 50
    factors, _ = _run(AdaGC(*settings, norm_type), rows)
    np.testing.assert_allclose(factors, _oracle(rows, *settings, norm_type), rtol=1e-12)


def test_reports_the_limit_of_the_warm_up():
    """While all are scaled together the limit of the total norm is lambda_abs, then there is none."""
    _, limits = _run(AdaGC(lambda_abs=2.0, warmup=2), np.ones((4, 3)))
    np.testing.assert_array_equal(limits, [2.0, 2.0, math.nan, math.nan])


def test_a_parameter_that_wakes_up_late():
    """Steps without a gradient do not bring the average to zero, which would lock it there."""
    rows = np.ones((40, 2))
    rows[:20, 0] = 0.0
    rows[25, 0] = 0.0
    factors, _ = _run(AdaGC(lambda_abs=math.inf, warmup=5), rows)
    np.testing.assert_array_equal(factors, np.ones((40, 2)))


def test_spike_in_one_parameter():
    """A spike is limited where it is; the other parameters are left alone."""
    rows = np.ones((30, 3))
    rows[20, 1] = 100.0
    factors, _ = _run(AdaGC(warmup=1, lambda_abs=math.inf), rows)
    np.testing.assert_allclose(factors[20], [1.0, 0.0105, 1.0])
    np.testing.assert_array_equal(factors[21:], np.ones((9, 3)))


def test_one_bad_norm_stops_the_whole_step():
    """Where one norm is not finite the step counts for no parameter."""
    policy = AdaGC(warmup=3)
    _run(policy, [[0.5, 0.2]])
    before = policy.state_dict()
    _run(policy, [[0.1, math.nan], [math.inf, 0.1]])
    assert policy.state_dict() == before


def test_without_parameters():
    """An optimizer without parameters is nothing to fail at."""
    assert AdaGC().decide(torch.zeros(0)).coefficient is None


def test_another_count_of_parameters_is_refused():
    """The message names both counts and what to do."""
    policy = AdaGC()
    _run(policy, [[1.0, 2.0]])
    with pytest.raises(ValueError, match="averages of 2 parameters and is asked about 3"):
        _run(policy, [[1.0, 2.0, 3.0]])

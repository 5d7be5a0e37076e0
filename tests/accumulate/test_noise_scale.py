"""The noise scale against gradients whose mean and covariance are known."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gradwatch.accumulate.noise_scale import NoiseScale, NoiseScaleEstimator, noise_terms

SIZE = 8  # examples in a micro-batch
SIGNAL = 1.0  # |G|^2


def _windows(b_simple, k, shape, dimension=512, seed=0, signal=SIGNAL):
    """Draws (tr(Sigma), |G|^2) of windows of k micro-batches; the spectrum is a power law."""
    rng = np.random.default_rng(seed)
    spectrum = 1 / np.arange(1, dimension + 1)
    spectrum *= b_simple * SIGNAL / spectrum.sum()
    gradient = rng.standard_normal(dimension)
    gradient *= math.sqrt(signal) / np.linalg.norm(gradient)
    noise = rng.standard_normal((*shape, k, dimension), dtype=np.float32)
    micro = gradient + noise * np.sqrt(spectrum / SIZE, dtype=np.float32)
    small_sq = (micro**2).sum(-1).mean(-1)
    big_sq = (micro.mean(-2) ** 2).sum(-1)
    return np.stack(noise_terms(small_sq, SIZE, big_sq, SIZE * k), axis=-1)


def _estimate(terms, k, beta=0.99, size=SIZE):
    estimator = NoiseScaleEstimator(beta)
    for tr_sigma, grad_sq in terms.tolist():
        estimator.update(tr_sigma, grad_sq, k * size, size)
    return estimator.read()


@given(
    gradients=st.integers(2, 6).flatmap(
        lambda k: arrays(np.float64, (k, 3), elements=st.floats(-10, 10, allow_subnormal=False))
    ),
    size=st.integers(1, 64),
)
def test_equal_micro_batches_give_the_textbook_sums(gradients, size):
    """tr(Sigma) is the variance between micro-batches, |G|^2 the mean product of two of them."""
    k, mean = len(gradients), gradients.mean(0)
    small_sq, big_sq = (gradients**2).sum(1).mean(), mean @ mean
    tr_sigma, grad_sq = noise_terms(small_sq, size, big_sq, size * k)
    products = gradients @ gradients.T
    between = (products.sum() - products.trace()) / (k * (k - 1))
    variance = size / (k - 1) * ((gradients - mean) ** 2).sum()
    scale = 1e-12 * k * small_sq
    np.testing.assert_allclose(tr_sigma, variance, rtol=1e-12, atol=size * scale)
    np.testing.assert_allclose(grad_sq, between, rtol=1e-12, atol=scale)


def test_unequal_micro_batches_are_unbiased():
    """Weighted means over micro-batches of 8, 8, 8 and 2 give tr(Sigma) and |G|^2 on average."""
    rng, weights, draws = np.random.default_rng(0), np.array([8.0, 8.0, 8.0, 2.0]), 20_000
    total = weights.sum()
    # 16 dimensions of variance 1, and a gradient of length 1.
    micro = rng.standard_normal((draws, 4, 16)) / np.sqrt(weights)[:, None]
    micro[..., 0] += 1.0
    small_sq = (micro**2).sum(-1) @ weights / total
    big_sq = ((weights[:, None] * micro).sum(1) ** 2).sum(-1) / total**2
    for found, truth in zip(noise_terms(small_sq, total / 4, big_sq, total), (16, 1), strict=True):
        assert abs(found.mean() - truth) < 3 * found.std() / math.sqrt(draws)
    plain = (micro**2).sum(-1).mean(-1)
    biased, _ = noise_terms(plain, total / 4, big_sq, total)
    assert biased.mean() > 20


@pytest.mark.parametrize(("b_simple", "k"), [(1, 2), (16, 2), (16, 4), (64, 8)])
def test_a_known_noise_scale_is_found(b_simple, k):
    """Up to the size of the batch, nine runs in ten are within 20 % after 50 windows."""
    found = [_estimate(run, k) for run in _windows(b_simple, k, (64, 50))]
    ratios = np.array([float(noise) for noise in found]) / b_simple
    assert (abs(ratios - 1) < 0.2).mean() >= 0.9
    assert all(noise.valid for noise in found)
    powers = {b_simple // SIZE // 2 or 1, b_simple // SIZE or 1, 2 * b_simple // SIZE or 1}
    assert {noise.suggested_micro_batches for noise in found} <= powers


def test_standard_errors_are_calibrated():
    """The truth is within two standard errors in about 95 % of runs."""
    for k, steps in ((2, 30), (4, 100)):
        found = [_estimate(run, k) for run in _windows(16, k, (500, steps), dimension=32)]
        within = np.mean([abs(noise.b_simple - 16) < 2 * noise.stderr for noise in found])
        assert 0.9 <= within <= 0.99


def test_standard_errors_agree_with_a_plain_sample():
    """Where all windows weigh the same, they are those of NumPy's sample covariance."""
    terms = _windows(16, 4, (200,), dimension=32)
    noise = _estimate(terms, 4, beta=1 - 1e-12)
    (s, g), covariance = terms.mean(0), np.cov(terms.T) / len(terms)
    slope = np.array([1 / g, -s / g**2])
    np.testing.assert_allclose([noise.tr_sigma, noise.grad_sq], [s, g], rtol=1e-9)
    np.testing.assert_allclose(noise.significance, g / math.sqrt(covariance[1, 1]), rtol=1e-9)
    np.testing.assert_allclose(noise.stderr, math.sqrt(slope @ covariance @ slope), rtol=1e-9)


def test_too_few_windows_are_not_valid():
    """Below 20 windows the estimate is given, but not valid, and says so."""
    terms = _windows(16, 4, (20,))
    noise = _estimate(terms[:19], 4)
    assert not noise.valid
    assert noise.reason == "20 windows are needed, 19 were seen"
    assert noise.suggested_micro_batches is None
    assert math.isfinite(noise.b_simple)
    assert _estimate(terms, 4).valid


def test_nothing_seen_is_unknown():
    """Before the first window all numbers are NaN, and before the second all errors."""
    noise = NoiseScaleEstimator().read()
    assert math.isnan(float(noise))
    assert math.isnan(noise.batch)
    assert noise.reason == "20 windows are needed, 0 were seen"
    one = _estimate(_windows(16, 4, (1,)), 4)
    assert math.isfinite(one.tr_sigma)
    assert math.isnan(one.stderr)
    assert math.isnan(one.significance)


def test_pure_noise_is_not_valid():
    """Without a gradient there is no noise scale, whatever the ratio comes to."""
    for run in _windows(16, 2, (50, 100), dimension=128, signal=0.0):
        noise = _estimate(run, 2)
        assert not noise.valid
        assert noise.grad_sq > 0 or math.isnan(noise.b_simple)
        assert noise.tr_sigma == pytest.approx(16, rel=0.5)
    assert noise.high == math.inf
    assert noise.reason == (
        "the noise drowns the gradient: |G|^2 is not above 3 standard errors; the noise scale is at "
        f"least {noise.low:.3g}"
    )
    assert str(noise).startswith(f"at least {noise.low:.3g}")


def test_far_above_the_batch_is_not_valid():
    """A noise scale of 16 batches is significant after long, but out of range."""
    noise = _estimate(_windows(1024, 8, (3000,), dimension=128), 8, beta=0.999)
    assert noise.significance > 3
    assert noise.out_of_range
    assert not noise.valid
    assert noise.reason == (
        f"b_simple {noise.b_simple:.0f} is above 4 times the batch of 64, beyond what micro-batches "
        f"of this size can tell; the noise scale is at least {noise.low:.0f}"
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e301])
def test_a_bad_number_costs_one_window(bad):
    """A window with a NaN or an Inf, or without a size, leaves everything as it was."""
    estimator = NoiseScaleEstimator()
    for tr_sigma, grad_sq in _windows(16, 4, (30,)).tolist():
        estimator.update(tr_sigma, grad_sq, 32, 8)
    before = estimator.read()
    for window in (
        (bad, 1, 32, 8),
        (1, bad, 32, 8),
        (1, 1, 0, 8),
        (1, 1, 32, -1),
        (1, 1, math.nan, 8),
    ):
        estimator.update(*window)
    assert estimator.read() == before


@pytest.mark.parametrize("scale", [1e-8, 1e8, 1e-220, 1e220])
def test_the_scale_of_the_gradients_does_not_matter(scale):
    """A loss multiplied by any number changes nothing but the unit of the gradients."""
    terms = _windows(16, 4, (60,))
    plain, scaled = _estimate(terms, 4), _estimate(terms * scale, 4)
    for field in ("b_simple", "stderr", "micro_batches", "significance"):
        assert getattr(scaled, field) == pytest.approx(getattr(plain, field), rel=1e-9)
    assert scaled.valid
    assert scaled.suggested_micro_batches == plain.suggested_micro_batches == 2
    assert scaled.tr_sigma == pytest.approx(plain.tr_sigma * scale)


@given(unit=st.sampled_from([0.5, 2.0, 512.0]))
@settings(max_examples=3)
def test_the_unit_of_the_weights_is_the_unit_of_the_answer(unit):
    """Counted in tokens instead of examples, b_simple is larger and the suggestion the same."""
    terms = _windows(16, 4, (60,))
    plain = _estimate(terms, 4)
    other = _estimate(terms * [unit, 1], 4, size=SIZE * unit)
    assert other.b_simple == pytest.approx(unit * plain.b_simple)
    assert other.stderr == pytest.approx(unit * plain.stderr)
    assert other.micro_batches == pytest.approx(plain.micro_batches)


def test_equal_gradients_have_no_noise():
    """Where all micro-batches agree to the last bit or nearly so, one of them is enough."""
    for tr_sigma in (0.0, -1e-17):
        noise = _estimate(np.array([[tr_sigma, 2.0]] * 20), 4)
        assert noise.valid
        assert (noise.b_simple, noise.stderr, noise.suggested_micro_batches) == (0.0, 0.0, 1)
        assert (noise.low, noise.high) == (0.0, 0.0)


@given(
    terms=st.lists(
        st.tuples(st.floats(-1e300, 1e300), st.floats(-1e300, 1e300)), min_size=1, max_size=30
    )
)
@settings(max_examples=50, deadline=None)
def test_the_state_is_always_plain_json(terms):
    """Whatever finite numbers come, the state has no NaN and no Inf, and reading works."""
    estimator = NoiseScaleEstimator()
    for pair in terms:
        estimator.update(*pair, 32, 8)
    json.dumps(estimator.state_dict(), allow_nan=False)
    noise = estimator.read()
    assert not noise.stderr < 0
    assert noise.valid == (noise.reason == "")


@pytest.mark.parametrize("seen", [0, 1, 25])
def test_a_restored_estimator_goes_on_bit_for_bit(seen):
    """State that went through JSON continues exactly as the original does."""
    terms = _windows(16, 4, (60,)).tolist()
    original, restored = NoiseScaleEstimator(), NoiseScaleEstimator()
    for pair in terms[:seen]:
        original.update(*pair, 32, 8)
    restored.load_state_dict(json.loads(json.dumps(original.state_dict(), allow_nan=False)))
    for pair in terms[seen:]:
        original.update(*pair, 32, 8)
        restored.update(*pair, 32, 8)
    assert restored.state_dict() == original.state_dict()
    assert restored.read() == original.read()


@pytest.mark.parametrize("beta", [0.0, 1.0, -1.0, 1.5, math.nan])
def test_beta_is_between_0_and_1(beta):
    """A beta out of bounds is refused with the bounds and a better one."""
    with pytest.raises(ValueError, match=r"beta=\) must be between 0 and 1, got .* Write 0.99"):
        NoiseScaleEstimator(beta)


TRUTHS = (0.1, 1.0, 4.0, 16.0, 100.0)  # of the noise scale, in batches
SHORT = [(2, 20), (4, 50), (16, 20)]
LONG = [(2, 400), (4, 400), (16, 100)]


@pytest.mark.parametrize(
    ("k", "steps", "runs"),
    [*((*one, 40) for one in SHORT)]
    + [pytest.param(*one, 200, marks=pytest.mark.slow) for one in (*SHORT, *LONG)],
)
@pytest.mark.parametrize("truth", TRUTHS)
def test_the_truth_is_within_the_interval(k, steps, runs, truth):
    """In 95 % of runs, whether the scale is below the batch or 100 times above; and what is valid is right."""
    b_simple = truth * k * SIZE
    found = [
        _estimate(run, k) for run in _windows(b_simple, k, (runs, steps), dimension=64, seed=1)
    ]
    within = np.array([noise.low <= b_simple <= noise.high for noise in found])
    assert within.mean() >= (0.92 if runs == 200 else 0.87)
    assert np.mean([noise.valid and noise.high < b_simple for noise in found]) <= 0.05
    if truth >= 16 and steps <= 100:
        assert np.mean([noise.high == math.inf for noise in found]) > 0.5
    if truth <= 1:
        assert all(noise.valid and noise.high < math.inf for noise in found)
        assert str(found[0]).count(" to ") == 1


def test_a_change_widens_the_interval():
    """Where the noise scale has grown, the interval reaches from the averages to the newest windows."""
    terms = np.concatenate([_windows(4, 4, (150,)), _windows(40, 4, (50,), seed=1)])
    noise = _estimate(terms, 4)
    assert noise.low < noise.b_simple < 40 < noise.high


def test_the_interval_is_that_of_fieller():
    """Its ends are the roots of the quadratic, with Student's quantile for the effective number."""
    terms = _windows(64, 4, (60,))
    noise = _estimate(terms, 4, beta=1 - 1e-12)
    mean, covariance = terms.mean(0), np.cov(terms.T) / len(terms)
    quantile = (
        2.2558  # of Student's distribution with 59 degrees of freedom, where 2.2 is the normal's
    )

    def far(ratio):
        slope = np.array([1.0, -ratio])
        return abs(slope @ mean) / math.sqrt(slope @ covariance @ slope)

    assert far(noise.low) == pytest.approx(quantile, rel=1e-3)
    assert far(noise.high) == pytest.approx(quantile, rel=1e-3)


def test_a_state_of_an_earlier_version_goes_on():
    """Without the averages over the newest windows, these begin anew."""
    terms = _windows(16, 4, (60,)).tolist()
    original, restored = NoiseScaleEstimator(), NoiseScaleEstimator()
    for pair in terms[:30]:
        original.update(*pair, 32, 8)
    state = original.state_dict()
    del state["recent"]
    restored.load_state_dict(state)
    for pair in terms[30:]:
        original.update(*pair, 32, 8)
        restored.update(*pair, 32, 8)
    assert restored.read().b_simple == original.read().b_simple
    assert restored.read().low == pytest.approx(original.read().low)


def test_an_estimate_is_a_number():
    """float() of an estimate is the noise scale."""
    noise = NoiseScale(48.0, 48.0, 1.0, 2.0, True, 50, 4)
    assert float(noise) == 48.0
    assert not noise.out_of_range

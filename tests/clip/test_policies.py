"""What every clipping policy promises, and the numbers of the fixed ones."""

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

from gradwatch.clip.adagc import AdaGC
from gradwatch.clip.agc import AdaptiveGradientClip
from gradwatch.clip.autoclip import AutoClip
from gradwatch.clip.fixed import ClipByNorm, ClipByValue
from gradwatch.clip.policy import ClipPolicy
from gradwatch.clip.robust import RobustClip
from gradwatch.clip.zclip import ZClip
from gradwatch.testing import late_readings
from tests.support.calls import CountCalls

POLICIES = [
    ClipByNorm(1.0),
    ClipByNorm(0.3, norm_type=math.inf),
    ClipByNorm(1.0, scope="group"),
    ClipByNorm(1.0, scope="parameter"),
    ClipByValue(0.5),
    AutoClip(),
    AutoClip(50, window=7, warmup=2),
    AutoClip(10, window=50, warmup=1, include_current=True),
    ZClip(),
    ZClip(warmup_steps=5, update="clipped"),
    ZClip(0.9, 1.5, 3, max_norm=2.0),
    RobustClip(),
    RobustClip(2.0, window=9, warmup=5),
    AdaptiveGradientClip(),
    AdaGC(),
    AdaGC(1.5, 0.9, math.inf, warmup=4),
]
FIXED = (ClipByNorm, ClipByValue, AdaptiveGradientClip)
LEARNING = [policy for policy in POLICIES if not isinstance(policy, FIXED)]
SCALE_FREE = [
    policy
    for policy in LEARNING
    if getattr(policy, "max_norm", None) is None and getattr(policy, "lambda_abs", 0) != 1.0
]
NAN, INF = math.nan, math.inf
ANY_NORM = st.one_of(
    st.floats(0.0, width=32), st.floats(0.5, 2.0), st.sampled_from([NAN, INF, 0.0, 1.0])
)
every = pytest.mark.parametrize("policy", POLICIES, ids=repr)
learning = pytest.mark.parametrize("policy", LEARNING, ids=repr)


def _norms(policy, norm):
    """Returns what a policy of this scope is asked with."""
    norm = torch.tensor(norm, dtype=torch.float64)
    return norm if policy.scope == "global" else torch.stack((norm, norm / 2, norm / 4))


def _decide(policy, norm):
    """Returns the factors, ones where the gradients are left, and the limit."""
    norms = _norms(policy, norm)
    decision = policy.decide(norms)
    factors = torch.ones_like(norms) if decision.coefficient is None else decision.coefficient
    assert factors.shape == norms.shape
    assert factors.dtype == norms.dtype
    return [*factors.reshape(-1).tolist(), float(decision.threshold)]


def _sequence(seed, length=120):
    """Returns norms with outliers, a lasting rise and a fall."""
    random = np.random.default_rng(seed)
    norms = np.exp(random.normal(0, random.choice([0.02, 0.15, 0.5]), length))
    norms[random.integers(0, length, 6)] *= 10 ** random.uniform(-3, 3, 6)
    norms[length // 2 :] *= 3
    norms[3 * length // 4 :] /= 10
    return norms.tolist()


@every
class TestEveryPolicy:
    """The contract of ClipPolicy."""

    def test_follows_the_protocol(self, policy):
        """A policy is recognised by its methods, and says what norms it wants."""
        assert isinstance(policy, ClipPolicy)
        assert policy.scope in {"global", "group", "parameter"}
        assert policy.norm_type > 0

    @pytest.mark.parametrize("late", [False, True])
    @settings(max_examples=30, deadline=None)
    @given(norms=st.lists(ANY_NORM, min_size=1, max_size=40))
    def test_never_enlarges_a_gradient(self, policy, late, norms):
        """Whatever came before, the factors are between 0 and 1, and the state is finite."""
        policy = copy.deepcopy(policy)
        with late_readings() if late else nullcontext():
            for norm in norms:
                *factors, _ = _decide(policy, norm)
                assert not math.isfinite(norm) or all(0.0 <= factor <= 1.0 for factor in factors)
        json.dumps(policy.state_dict(), allow_nan=False)

    @pytest.mark.parametrize("late", [False, True])
    @settings(max_examples=30, deadline=None)
    @given(norms=st.lists(ANY_NORM, min_size=1, max_size=40), data=st.data())
    def test_resumes(self, policy, late, norms, data):
        """Stopped and restored at any step, through JSON, it decides as one that was not."""
        stop = data.draw(st.integers(0, len(norms)))
        whole, first, second = (copy.deepcopy(policy) for _ in range(3))
        with late_readings() if late else nullcontext():
            expected = [_decide(whole, norm) for norm in norms]
            for norm in norms[:stop]:
                _decide(first, norm)
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
            resumed = [_decide(second, norm) for norm in norms[stop:]]
        np.testing.assert_array_equal(resumed, expected[stop:])

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
    def test_goes_to_another_process(self, policy, copied):
        """A copy, pickled or deep, decides as the original and does not share its memory."""
        policy, norms = copy.deepcopy(policy), _sequence(0)
        for norm in norms[:50]:
            _decide(policy, norm)
        twin = copied(policy)
        assert repr(twin) == repr(policy)
        expected = [_decide(policy, norm) for norm in norms[50:]]
        np.testing.assert_array_equal([_decide(twin, norm) for norm in norms[50:]], expected)

    def test_never_waits(self, policy):
        """Where the norms are not at hand, no number is asked for."""
        policy = copy.deepcopy(policy)
        norms = [_norms(policy, norm) for norm in (*_sequence(1, 40), NAN, 0.0, 1.0)]
        with late_readings(), CountCalls() as counter:
            for norm in norms:
                policy.decide(norm)
        assert counter.waits == 0

    @pytest.mark.parametrize("seed", range(3))
    def test_decides_alike_everywhere(self, policy, seed):
        """On the host, on a device, and moved there and back, the decisions are the same."""
        norms = _sequence(seed)
        norms[20:20] = [NAN, 0.0, INF]
        host, device, moving = (copy.deepcopy(policy) for _ in range(3))
        for step, norm in enumerate(norms):
            on_host = _decide(host, norm)
            with late_readings():
                on_device = _decide(device, norm)
            with late_readings() if step // 13 % 2 else nullcontext():
                moved = _decide(moving, norm)
            if math.isfinite(norm):
                np.testing.assert_allclose(on_device, on_host, rtol=1e-12)
                np.testing.assert_allclose(moved, on_host, rtol=1e-12)

    def test_does_as_well_in_single_precision(self, policy):
        """The factors have the dtype of the norms and are exact in it."""
        single, double = copy.deepcopy(policy), copy.deepcopy(policy)
        for norm in np.float32(_sequence(2)).tolist():
            *expected, _ = _decide(double, norm)
            coefficient = single.decide(_norms(policy, norm).float()).coefficient
            if coefficient is not None:
                assert coefficient.dtype == torch.float32
                got = coefficient.double().reshape(-1)
                np.testing.assert_allclose(got, expected, rtol=3e-7)


@learning
class TestEveryLearningPolicy:
    """What those that remember earlier norms promise besides."""

    @pytest.mark.parametrize("late", [False, True])
    @pytest.mark.parametrize("strange", [NAN, INF, -INF, 0.0])
    def test_one_strange_norm_changes_nothing(self, policy, late, strange):
        """A norm that is zero or not finite is left alone and changes no later decision."""
        policy, norms = copy.deepcopy(policy), _sequence(3)
        undisturbed = copy.deepcopy(policy)
        with late_readings() if late else nullcontext():
            for step, norm in enumerate(norms):
                if step in {2, 11, 30, 77}:
                    *factors, _ = _decide(policy, strange)
                    assert set(factors) == {1.0}
                np.testing.assert_array_equal(_decide(policy, norm), _decide(undisturbed, norm))

    def test_a_memory_is_its_own(self, policy):
        """Two policies made alike share nothing."""
        used, fresh = copy.deepcopy(policy), copy.deepcopy(policy)
        before = fresh.state_dict()
        for norm in _sequence(4, 30):
            _decide(used, norm)
        assert fresh.state_dict() == before
        assert used.state_dict() != before


@pytest.mark.parametrize("policy", SCALE_FREE, ids=repr)
@pytest.mark.parametrize("scale", [100.0, 1e-6, 1e-20, 1e20, 2.0**-40])
@pytest.mark.parametrize("late", [False, True])
def test_scale_changes_no_decision(policy, scale, late):
    """The loss multiplied by any number, the same steps are clipped by the same factors."""
    plain, scaled = copy.deepcopy(policy), copy.deepcopy(policy)
    with late_readings() if late else nullcontext():
        for norm in _sequence(5):
            *expected, threshold = _decide(plain, norm)
            *factors, scaled_threshold = _decide(scaled, norm * scale)
            np.testing.assert_allclose(factors, expected, rtol=1e-9)
            np.testing.assert_allclose(scaled_threshold, threshold * scale, rtol=1e-9)
            assert [factor == 1.0 for factor in factors] == [factor == 1.0 for factor in expected]


@pytest.mark.parametrize("norm", [0.0, 0.5, 1.0, 1.0000001, 2.0, 12345.678])
@pytest.mark.parametrize("max_norm", [1.0, 0.1, 1e-3, 7.5])
def test_coefficient_is_torchs(norm, max_norm):
    """The factor equals, bit for bit, what clip_grad_norm_ multiplies with."""
    gradient = torch.tensor([norm])
    leaf = _with_grad(gradient.clone())
    total = torch.nn.utils.clip_grad_norm_([leaf], max_norm)
    decision = ClipByNorm(max_norm).decide(total)
    factor = 1.0 if decision.coefficient is None else decision.coefficient
    assert torch.equal(gradient * factor, leaf.grad)
    assert decision.threshold == max_norm


@pytest.mark.parametrize("scope", ["group", "parameter"])
def test_each_part_is_limited_by_itself(scope):
    """With a narrower scope each norm has the factor that it would have alone."""
    norms = torch.tensor([0.0, 0.5, 2.0, 1e6])
    decision = ClipByNorm(1.0, scope=scope).decide(norms)
    alone = torch.clamp(1.0 / (norms + 1e-6), max=1.0)
    assert torch.equal(decision.coefficient, alone)
    assert math.isnan(decision.threshold)
    assert ClipByNorm(1.0, scope=scope).decide(norms[:2]).coefficient is None
    assert ClipByNorm(1.0, scope=scope).decide(norms[:0]).coefficient.shape == (0,)


def test_an_infinite_limit_only_measures():
    """ClipByNorm(inf) leaves every finite norm alone."""
    assert ClipByNorm(math.inf).decide(torch.tensor(1e30)).coefficient is None


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (
            lambda: ClipByNorm(0),
            ValueError,
            r"ClipByNorm\(max_norm=\) must be greater than 0, got 0",
        ),
        (lambda: ClipByNorm("1"), TypeError, r"must be a number, got '1' of type str"),
        (lambda: ClipByNorm(1, scope="layer"), ValueError, r"'global' or 'group' or 'parameter'"),
        (lambda: ClipByNorm(1, scope=2), TypeError, r"ClipByNorm\(scope=\).* got 2 of type int"),
        (lambda: AutoClip(0), ValueError, r"percentile=\) must be between 0 and 100, got 0"),
        (lambda: AutoClip(100.0), ValueError, r"Write 90 to clip the largest tenth"),
        (lambda: AutoClip(NAN), ValueError, r"got nan"),
        (lambda: AutoClip(True), TypeError, r"must be a number, got True of type bool"),
        (lambda: AutoClip(window=0), ValueError, r"AutoClip\(window=\) must be at least 1, got 0"),
        (lambda: AutoClip(window=9.5), TypeError, r"whole number of steps, got 9.5 of type float"),
        (
            lambda: AutoClip(window=3),
            ValueError,
            r"warmup=\) must be at most the window of 3, got 5",
        ),
        (lambda: AutoClip(norm_type=-1), ValueError, r"AutoClip\(norm_type=\)"),
        (lambda: ZClip(alpha=1), ValueError, r"ZClip\(alpha=\) must be between 0 and 1, got 1"),
        (lambda: ZClip(z_thresh=0), ValueError, r"ZClip\(z_thresh=\) must be greater than 0"),
        (lambda: ZClip(warmup_steps=0), ValueError, r"ZClip\(warmup_steps=\) must be at least 1"),
        (lambda: ZClip(max_norm=-1.0), ValueError, r"ZClip\(max_norm=\) must be greater than 0"),
        (lambda: ZClip(update="raw"), ValueError, r"'winsorized' or 'clipped', got 'raw'"),
        (lambda: RobustClip(z_thresh=NAN), ValueError, r"RobustClip\(z_thresh=\)"),
        (lambda: RobustClip(window=2), ValueError, r"RobustClip\(window=\) must be at least 3"),
        (lambda: RobustClip(window=20), ValueError, r"at most the window of 20, got 25"),
        (lambda: AdaptiveGradientClip(0), ValueError, r"AdaptiveGradientClip\(clip_factor=\)"),
        (lambda: AdaptiveGradientClip(eps=0), ValueError, r"AdaptiveGradientClip\(eps=\)"),
        (lambda: AdaptiveGradientClip(exclude="head"), TypeError, r"Write \('head.\*',\)"),
        (lambda: AdaptiveGradientClip(exclude=(1,)), TypeError, r"got \(1,\) of type tuple"),
        (lambda: AdaGC(0.9), ValueError, r"AdaGC\(lambda_rel=\) must be at least 1, got 0.9"),
        (lambda: AdaGC(beta=0.0), ValueError, r"AdaGC\(beta=\) must be between 0 and 1, got 0.0"),
        (lambda: AdaGC(lambda_abs=0.0), ValueError, r"AdaGC\(lambda_abs=\)"),
        (lambda: AdaGC(warmup=-1), ValueError, r"AdaGC\(warmup=\) must be at least 0, got -1"),
    ],
)
def test_bad_arguments_are_named(make, error, text):
    """A constructor names the argument, the bound and the value."""
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize("policy", [AutoClip(), ZClip(), RobustClip()], ids=repr)
def test_a_foreign_state_is_refused(policy):
    """A state of something else, or one that is not finite, is refused with what to do."""
    with pytest.raises(ValueError, match=r"window.* is missing\. Load what state_dict\(\)"):
        policy.load_state_dict({})
    state = {**policy.state_dict(), "window": [1.0, NAN]}
    with pytest.raises(ValueError, match="must be finite"):
        policy.load_state_dict(state)


def _with_grad(gradient):
    leaf = torch.zeros_like(gradient, requires_grad=True)
    leaf.grad = gradient
    return leaf

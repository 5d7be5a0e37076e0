"""What every clipping policy promises, and the numbers of each."""

import math
import pickle

import pytest
import torch

from gradwatch import ClipByNorm, ClipByValue, ClipPolicy

POLICIES = [ClipByNorm(1.0), ClipByNorm(0.3, norm_type=math.inf), ClipByValue(0.5)]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
class TestEveryPolicy:
    """The contract of ClipPolicy."""

    def test_follows_the_protocol(self, policy):
        """A policy is recognised by its methods."""
        assert isinstance(policy, ClipPolicy)

    @pytest.mark.parametrize("norm", [0.0, 1e-30, 1.0, 1e30])
    def test_never_enlarges_a_gradient(self, policy, norm):
        """The coefficient is between 0 and 1 whatever the norm."""
        coefficient = policy.decide(torch.tensor(norm)).coefficient
        assert coefficient is None or 0.0 <= coefficient.item() <= 1.0

    def test_state_survives_a_checkpoint(self, policy):
        """The state loads back, and the decision is the same."""
        before = policy.decide(torch.tensor(3.0))
        policy.load_state_dict(policy.state_dict())
        assert policy.decide(torch.tensor(3.0)) == before

    def test_pickles(self, policy):
        """A policy goes to another process."""
        assert pickle.loads(pickle.dumps(policy)) == policy


@pytest.mark.parametrize("norm", [0.0, 0.5, 1.0, 1.0000001, 2.0, 12345.678])
@pytest.mark.parametrize("max_norm", [1.0, 0.1, 1e-3, 7.5])
def test_coefficient_is_torchs(norm, max_norm):
    """The factor equals, bit for bit, what clip_grad_norm_ multiplies with."""
    gradient = torch.tensor([norm])
    expected = gradient.clone()
    torch.nn.utils.clip_grads_with_norm_([leaf := _with_grad(expected)], max_norm, expected.norm())
    decision = ClipByNorm(max_norm).decide(gradient.norm())
    factor = 1.0 if decision.coefficient is None else decision.coefficient
    assert torch.equal(gradient * factor, leaf.grad)
    assert decision.threshold == max_norm


def test_an_infinite_limit_only_measures():
    """ClipByNorm(inf) leaves every finite norm alone."""
    assert ClipByNorm(math.inf).decide(torch.tensor(1e30)).coefficient is None


def _with_grad(gradient):
    leaf = torch.zeros_like(gradient, requires_grad=True)
    leaf.grad = gradient
    return leaf

"""AdaptiveGradientClip against its formula, unit by unit."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from gradwatch.clip.agc import AdaptiveGradientClip
from gradwatch.testing import late_readings
from tests.support.calls import CountCalls


def _oracle(gradient, weight, clip_factor=0.01, eps=1e-3, norm_type=2.0):
    """Clips row by row with NumPy; one dimension or none is one row."""
    gradient, weight = gradient.double().numpy(), weight.double().numpy()
    rows = len(gradient) if gradient.ndim > 1 else 1
    g, w = gradient.reshape(rows, -1), weight.reshape(rows, -1)
    clipped = np.empty_like(g)
    for row in range(rows):
        most = clip_factor * max(np.linalg.norm(w[row], norm_type), eps)
        size = np.linalg.norm(g[row], norm_type)
        clipped[row] = g[row] * most / size if size > most else g[row]
    return clipped.reshape(gradient.shape)


@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (4, 3, 5), (6, 2, 3, 3), (2, 1, 2, 2, 2)])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_formula(shape, norm_type):
    """Rows of dimension 0 are limited one by one; a bias as a whole."""
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64)
    gradient = torch.randn(shape, dtype=torch.float64)
    if shape:
        gradient[0] *= 1e-3
    policy = AdaptiveGradientClip(0.1, norm_type=norm_type)
    factors = policy.coefficient("weight", gradient, weight)
    expected = _oracle(gradient, weight, 0.1, norm_type=norm_type)
    np.testing.assert_allclose(gradient * factors, expected, rtol=1e-12)
    assert factors.shape == (shape[:1] + (1,) * len(shape[1:]) if len(shape) > 1 else ())


def test_zero_gradients_and_zero_weights():
    """A zero gradient has factor 1; zero weights count as eps."""
    gradient = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    factors = AdaptiveGradientClip().coefficient("weight", gradient, torch.zeros(2, 2))
    np.testing.assert_allclose(factors, [[1.0], [0.01 * 1e-3 / 5]], rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-20, 1e-8, 1e8, 1e18])
def test_scaling_both_changes_nothing(scale):
    """Where eps does not bind, gradients and weights in another unit have the same factors."""
    torch.manual_seed(0)
    gradient, weight = torch.randn(4, 3), torch.randn(4, 3)
    policy = AdaptiveGradientClip(0.1, eps=1e-30)
    expected = policy.coefficient("weight", gradient, weight)
    factors = policy.coefficient("weight", gradient * scale, weight * scale)
    torch.testing.assert_close(factors, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_accumulated_in_single(dtype):
    """Norms beyond the range of a half are exact, and the factors are float32."""
    gradient, weight = torch.full((2, 64), 60000.0).to(dtype), torch.ones(2, 64, dtype=dtype)
    factors = AdaptiveGradientClip().coefficient("weight", gradient, weight)
    assert factors.dtype == torch.float32
    np.testing.assert_allclose(factors, 1e-2 / gradient[:, :1].double(), rtol=1e-6)


def test_excludes_by_name():
    """Patterns are those of a shell, with case, over the whole name."""
    policy = AdaptiveGradientClip(exclude=["head.*", "*.bias"])
    one = torch.ones(2, 2)
    for name in ("head.weight", "head.0.weight", "body.0.bias"):
        assert policy.coefficient(name, one, one) is None
    for name in ("body.weight", "Head.weight", "header", "bias"):
        assert policy.coefficient(name, one, one) is not None


def test_an_empty_parameter_is_left_alone():
    """There is nothing to limit in a tensor without elements."""
    policy = AdaptiveGradientClip(norm_type=math.inf)
    assert policy.coefficient("weight", torch.ones(0, 3), torch.ones(0, 3)) is None


def test_a_sparse_gradient_is_refused():
    """Its message names the parameter and what to write."""
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"of embed\.weight: .*Write exclude=\('embed\.weight',\)"):
        AdaptiveGradientClip().coefficient("embed.weight", embedding.weight.grad, embedding.weight)


def test_decides_by_units_without_a_wait():
    """The decision refers to the policy itself; neither it nor the factors ask for a number."""
    policy, one = AdaptiveGradientClip(), torch.ones(3, 2)
    with late_readings(), CountCalls() as counter:
        decision = policy.decide(torch.tensor(1.0))
        decision.units.coefficient("weight", one, one)
    assert counter.waits == 0
    assert decision.units is policy
    assert decision.coefficient is None
    assert math.isnan(decision.threshold)

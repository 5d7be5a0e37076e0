"""The batched norms against float64 references."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch.measure.norms import gradient_norms, total_norm, wide_norms
from tests.support import float64

shapes = st.lists(st.lists(st.integers(0, 5), min_size=0, max_size=3), min_size=1, max_size=6)
norm_types = st.sampled_from([1.0, 2.0, 3.5, math.inf])


@settings(deadline=None, max_examples=60)
@given(shapes, norm_types, st.integers(0, 2**31), st.floats(1e-6, 1e6))
def test_norms_equal_a_float64_reference(shapes, norm_type, seed, size):
    """Each norm, and the total, agrees with float64 to float32 precision."""
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(shape, generator=generator) * size for shape in shapes]
    gradients = [g for g in gradients if g.numel()] or [torch.ones(1)]
    norms = gradient_norms(gradients, norm_type)
    expected = float64.norms({str(i): g for i, g in enumerate(gradients)}, norm_type)
    assert norms.tolist() == pytest.approx(list(expected.values()), rel=1e-5, abs=0)
    total = float64.total(expected, norm_type)
    assert total_norm(norms, norm_type).item() == pytest.approx(total, rel=1e-5, abs=0)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_total_is_the_very_number_of_torch(norm_type):
    """On float32 the total equals the one that clip_grad_norm_ returns, bit for bit."""
    torch.manual_seed(0)
    gradients = [torch.randn(n, 7) for n in range(1, 90)]
    leaves = [torch.zeros_like(gradient, requires_grad=True) for gradient in gradients]
    for leaf, gradient in zip(leaves, gradients, strict=True):
        leaf.grad = gradient.clone()
    expected = torch.nn.utils.clip_grad_norm_(leaves, math.inf, norm_type)
    assert torch.equal(total_norm(gradient_norms(gradients, norm_type), norm_type), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_accumulates_in_float32(dtype):
    """Finite half-precision gradients never give an infinite norm."""
    gradient = torch.full((4096,), 1000.0, dtype=dtype)
    (norm,) = gradient_norms([gradient])
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(64 * gradient[0].item(), rel=1e-6)


def test_mixed_dtypes_keep_their_order():
    """Groups of dtypes come back in the order of the gradients."""
    gradients = [
        torch.full((4,), 1.0),
        torch.full((4,), 2.0, dtype=torch.bfloat16),
        torch.full((4,), 3.0, dtype=torch.float64),
        torch.full((4,), 4.0),
    ]
    assert gradient_norms(gradients).tolist() == [2.0, 4.0, 6.0, 8.0]


def test_sparse_duplicates_add_up():
    """The norm of a sparse gradient is that of the dense one."""
    indices, values = torch.tensor([[1, 1, 3]]), torch.tensor([1.0, 2.0, 4.0])
    sparse = torch.sparse_coo_tensor(indices, values, (5,), check_invariants=True)
    assert gradient_norms([sparse]).tolist() == [5.0]


def test_complex_counts_both_parts():
    """A complex element has the magnitude of both its parts."""
    assert gradient_norms([torch.tensor([3 + 4j])]).tolist() == [5.0]


def test_no_gradient_has_no_norm():
    """Nothing has a total norm of zero, as in torch."""
    assert gradient_norms([]).shape == (0,)
    assert total_norm(gradient_norms([])).item() == 0.0


def test_wide_norms_do_not_overflow():
    """Float32 gradients beyond the square root of its maximum have a true norm in float64."""
    gradients = [torch.full((4,), 3e38), torch.full((4,), 1e38)]
    assert wide_norms(gradients).tolist() == pytest.approx([6e38, 2e38], rel=1e-6)
    assert math.isinf(gradient_norms(gradients)[0].item())

"""The batched norms against float64 references."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch.measure.norms import (
    gradient_norms,
    measure,
    total_norm,
    underflow_bound,
    wide_norms,
)
from tests.support import float64
from tests.support.calls import CountCalls

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


UNDERFLOWING = [
    (torch.float32, 1e-30),
    (torch.float32, 1e-41),
    (torch.bfloat16, 1e-30),
    (torch.complex64, 1e-30),
    (torch.float64, 1e-30),
]


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, 6.0, math.inf])
@pytest.mark.parametrize(("dtype", "size"), UNDERFLOWING, ids=str)
def test_powers_that_underflow_are_taken_in_float64(dtype, size, norm_type):
    """The norm of tiny elements, and the total of tiny norms, are those of float64; 0 stays 0."""
    gradients = [torch.full((9,), size), torch.zeros(3), torch.full((5, 2), -3 * size)]
    gradients = [gradient.to(dtype) for gradient in gradients]
    found = measure([0, 1, 2], gradients, norm_type)
    expected = float64.norms({str(i): g for i, g in enumerate(gradients)}, norm_type)
    assert found.norms.array().tolist() == pytest.approx(list(expected.values()), rel=1e-3, abs=0)
    total = float64.total(expected, norm_type)
    assert found.total.value() == pytest.approx(total, rel=1e-3, abs=0)
    assert found.total.value() == found.total.tensor.item()
    assert found.norms.tensor.dtype == torch.promote_types(torch.float32, dtype.to_real())


def test_tiny_norms_beside_usual_ones_change_no_bit_of_these():
    """Above the bound, norms and total are those of clip_grad_norm_, beside a tiny gradient too."""
    torch.manual_seed(0)
    usual = [torch.randn(n, 7) for n in range(1, 20)]
    tiny = torch.full((50,), 1e-25)
    found = measure(range(20), [*usual, tiny], 2.0)
    plain = gradient_norms([*usual, tiny])
    assert torch.equal(found.norms.tensor[:-1], plain[:-1])
    assert torch.equal(found.total.tensor, total_norm(plain))
    assert found.norms.array()[-1] == pytest.approx(50**0.5 * 1e-25)
    assert plain[-1] == 0


def test_tiny_sparse_and_empty_gradients():
    """A sparse gradient is summed first, and an empty one has no element to look at."""
    indices, values = torch.tensor([[1, 1, 3]]), torch.tensor([1e-30, 2e-30, 4e-30])
    sparse = torch.sparse_coo_tensor(indices, values, (5,), check_invariants=True)
    found = measure([0, 1], [sparse, torch.zeros(0)], 2.0)
    assert found.norms.array().tolist() == pytest.approx([5e-30, 0.0], rel=1e-6, abs=0)


def test_a_norm_above_the_bound_has_lost_no_digit():
    """At the bound, where every square underflows to a subnormal number, float32 is still right."""
    gradient = torch.full((10**6,), underflow_bound(2.0) / 1e3 * 1.01)
    norm = gradient_norms([gradient]).item()
    assert norm > underflow_bound(2.0)
    assert norm == pytest.approx(wide_norms([gradient]).item(), rel=1e-6)


def test_usual_gradients_cost_no_call_for_underflow():
    """One batched pass over the gradients; one more over those whose norm is 0, where there are any."""
    usual = [torch.ones(3) for _ in range(5)]
    some_zero = [*usual[:3], torch.zeros(3), torch.zeros(4)]
    with CountCalls() as counter:
        measure(range(5), usual, 2.0)
    assert counter.calls["aten._foreach_norm.Scalar"] == 1
    assert sum(counter.calls.values()) == 5
    with CountCalls() as counter:
        measure(range(5), some_zero, 2.0)
    assert counter.calls["aten._foreach_norm.Scalar"] == 2
    assert sum(counter.calls.values()) == 7


def test_the_total_of_a_part_of_tiny_norms():
    """The part of a measurement that an optimizer takes over has the total of float64 too."""
    gradients = [torch.full((4,), 1e-25) for _ in range(3)]
    part = measure([0, 1, 2], gradients, 2.0).subset([0, 2], 2.0)
    assert part.total.value() == pytest.approx(8**0.5 * 1e-25)

"""curvature against closed forms and full Hessians."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gradwatch
from gradwatch.hessian.curvature import curvature
from gradwatch.hessian.of_model import HessianProduct
from gradwatch.hessian.spectrum import estimate_trace, extreme_eigenvalues
from gradwatch.testing import LinearModel

from .matrices import symmetric


def _quadratic(matrix):
    x = torch.randn(
        len(matrix), dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).requires_grad_()
    return {"x": x}, lambda: 0.5 * x @ matrix @ x


def _full_hessian(model, loss):
    """The Hessian by torch.autograd.functional, with tied and frozen parameters as curvature counts them."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    flat = torch.cat([p.detach().reshape(-1) for p in parameters.values()])

    def of(vector):
        parts = vector.split([p.numel() for p in parameters.values()])
        named = {n: v.view_as(p) for (n, p), v in zip(parameters.items(), parts, strict=True)}
        return loss(lambda *args: torch.func.functional_call(model, named, args))

    return torch.autograd.functional.hessian(of, flat)


def _mlp(dtype=torch.float64):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)
    x, y = torch.randn(20, 3, dtype=dtype), torch.randn(20, 2, dtype=dtype)
    return model, lambda call: ((call(x) - y) ** 2).mean()


@settings(max_examples=40, deadline=None)
@given(
    eigenvalues=st.lists(st.floats(-100, 100).map(lambda v: round(v, 3)), min_size=1, max_size=24),
    seed=st.integers(0, 2**16),
)
def test_known_spectrum(eigenvalues, seed):
    """Of a quadratic form with known eigenvalues both ends are found, and the trace."""
    model, loss = _quadratic(symmetric(eigenvalues, seed))
    found = curvature(model, loss, tolerance=1e-6, seed=seed)
    scale = max(map(abs, eigenvalues)) + 1e-12
    assert found.converged
    assert found.largest_eigenvalue == pytest.approx(max(eigenvalues), abs=1e-5 * scale)
    assert found.smallest_eigenvalue == pytest.approx(min(eigenvalues), abs=1e-5 * scale)
    assert found.trace == pytest.approx(sum(eigenvalues), abs=1e-9 * scale * len(eigenvalues))
    assert found.trace_stderr == 0.0


def test_negative_curvature_dominates():
    """The eigenvalue of largest magnitude keeps its sign, and the top one is told apart from it."""
    found = curvature(*_quadratic(symmetric([-50.0, -1.0, 0.0, 2.0])))
    assert found.dominant_eigenvalue == pytest.approx(-50)
    assert found.largest_eigenvalue == pytest.approx(2)
    assert found.learning_rate_limit == pytest.approx(1)


def test_nothing_bends_upwards():
    """Without an upward direction no learning rate makes plain descent oscillate."""
    assert curvature(*_quadratic(symmetric([-3.0, -1.0]))).learning_rate_limit == math.inf


def test_least_squares():
    """The Hessian of the mean of half squared residuals is X^T X / n."""
    x = torch.randn(50, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = nn.Linear(7, 1, bias=False, dtype=torch.float64)
    found = curvature(model, lambda m: 0.5 * m(x).square().mean(), tolerance=1e-8)
    exact = torch.linalg.eigvalsh(x.T @ x / 50)
    assert found.largest_eigenvalue == pytest.approx(exact[-1].item(), rel=1e-7)
    assert found.smallest_eigenvalue == pytest.approx(exact[0].item(), rel=1e-6)
    assert found.trace == pytest.approx(exact.sum().item(), rel=1e-12)


def test_logistic_regression():
    """The Hessian of a logistic regression is X^T diag(p (1 - p)) X / n."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, dtype=torch.float64, generator=generator)
    y = (torch.rand(40, dtype=torch.float64, generator=generator) > 0.5).double()
    model = nn.Linear(5, 1, bias=False, dtype=torch.float64)
    criterion = nn.BCEWithLogitsLoss()
    found = curvature(model, lambda m: criterion(m(x)[:, 0], y), tolerance=1e-8)
    p = torch.sigmoid(model(x)[:, 0]).detach()
    exact = torch.linalg.eigvalsh(x.T @ torch.diag(p * (1 - p)) @ x / 40)
    assert found.largest_eigenvalue == pytest.approx(exact[-1].item(), rel=1e-7)
    assert found.trace == pytest.approx(exact.sum().item(), rel=1e-12)


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_small_mlp(dtype, rel):
    """For a small network eigenvalues and trace are those of its full Hessian."""
    model, loss = _mlp(dtype)
    exact = _full_hessian(model, loss)
    values = torch.linalg.eigvalsh(exact)
    found = curvature(model, loss, tolerance=1e-5, probes=64)
    assert found.parameters == len(exact) == found.probes
    assert found.largest_eigenvalue == pytest.approx(values[-1].item(), rel=max(rel, 1e-5))
    assert found.smallest_eigenvalue == pytest.approx(values[0].item(), rel=max(rel, 1e-4))
    assert found.trace == pytest.approx(exact.trace().item(), rel=rel)


def test_guide_quadratic():
    """The Hessian of the guide, [[2, 1], [1, 2]], has the eigenvalues 1 and 3 and the trace 4."""
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    found = curvature({"x": x}, lambda: x[0] ** 2 + x[1] ** 2 + x[0] * x[1])
    assert found.largest_eigenvalue == pytest.approx(3)
    assert found.smallest_eigenvalue == pytest.approx(1)
    assert (found.trace, found.trace_stderr) == (4.0, 0.0)


def test_one_parameter():
    """With one parameter the second derivative is eigenvalue and trace at once."""
    x = torch.tensor(2.0, requires_grad=True)
    found = curvature({"x": x}, lambda: x**3)
    assert found.largest_eigenvalue == found.smallest_eigenvalue == found.trace == 12.0
    assert (found.iterations, found.converged, found.parameters) == (1, True, 1)


def test_tied_weights_count_once():
    """A weight in two places is one weight: x² · x² bends by 12 x² and not by the parts."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.tensor(2.0))
            self.b = self.a

        def forward(self):
            return self.a**2 * self.b**2

    found = curvature(Twice(), lambda model: model())
    assert (found.parameters, found.largest_eigenvalue) == (1, 48.0)


def test_frozen_and_unused_parameters():
    """Frozen parameters are left out; unused ones are zero rows, and named."""
    model = nn.ModuleDict({"a": nn.Linear(2, 1), "b": nn.Linear(2, 1), "c": nn.Linear(2, 1)})
    model["b"].requires_grad_(False)
    x = torch.tensor([[1.0, 2.0], [0.5, -1.0]])
    found = curvature(model, lambda: (model["a"](x) + model["b"](x)).square().mean())
    assert found.parameters == 6
    assert found.unused == ("c.weight", "c.bias")
    assert found.smallest_eigenvalue == pytest.approx(0, abs=1e-5)
    assert "does not depend on c.weight, c.bias" in str(found)


@pytest.mark.parametrize("depends", [True, False])
def test_flat_loss(depends):
    """A loss that is linear in the weights, or independent of them, does not bend."""
    x = torch.ones(3, requires_grad=True)
    found = curvature({"x": x}, lambda: x.sum() if depends else torch.tensor(1.0))
    assert (found.largest_eigenvalue, found.smallest_eigenvalue, found.trace) == (0, 0, 0)
    assert found.converged
    assert found.unused == (() if depends else ("x",))


def test_forms_of_the_loss():
    """A function, a function of the model, a tensor and a module that is its loss are the same."""
    model, loss = _mlp()
    expected = curvature(model, loss)
    assert curvature(model, lambda: loss(model)) == expected
    assert curvature(model, loss(model)) == expected
    square = LinearModel([3.0, 4.0])
    assert curvature(square, square).trace == 0.0


def test_same_seed_same_numbers():
    """The seed decides every random number, dropout's too, whatever the global state is."""
    model = nn.Sequential(nn.Linear(4, 30), nn.Dropout(0.5), nn.Tanh(), nn.Linear(30, 1))
    x = torch.randn(8, 4)
    first = curvature(model, lambda m: m(x).square().mean(), probes=4)
    torch.manual_seed(99)
    assert curvature(model, lambda m: m(x).square().mean(), probes=4) == first
    assert curvature(model, lambda m: m(x).square().mean(), probes=4, seed=1).trace != first.trace


def test_nothing_is_touched():
    """Neither .grad, values, buffers, flags, hooks nor the random state change."""
    model = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Tanh(), nn.Linear(5, 1)
    )
    model[4].eval()
    x = torch.randn(8, 4)
    model(x).sum().backward()
    state = copy.deepcopy(model.state_dict())
    grads = [p.grad.clone() for p in model.parameters()]
    calls = []
    handle = model[0].weight.register_hook(lambda gradient: calls.append("hook") or gradient * 3)
    model[4].weight.register_post_accumulate_grad_hook(lambda p: calls.append("arrived"))
    before = torch.get_rng_state()
    curvature(model, lambda m: m(x).square().mean(), probes=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert calls == []
    assert [m.training for m in model] == [True] * 4 + [False]
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert torch.equal(parameter.grad, grad)
    model(x).sum().backward()
    assert sorted(calls) == ["arrived", "hook"]
    handle.remove()
    model(x).sum().backward()
    assert sorted(calls) == ["arrived", "arrived", "hook"]


def test_hook_on_a_gradient_does_not_scale_the_hessian():
    """A hook that changes a gradient on its way is no part of the loss."""
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    x.register_hook(lambda gradient: gradient * 10)
    assert curvature({"x": x}, lambda: x.square().sum()).trace == 4.0


def test_watcher_sees_nothing():
    """Between two steps of a watched training it adds no step, no event and no gradient."""

    def norms(bends):
        torch.manual_seed(0)
        model, x = nn.Linear(3, 1), torch.randn(4, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with gradwatch.watch(model, optimizer) as watcher:
            for _ in range(3):
                optimizer.zero_grad()
                if bends:
                    curvature(model, lambda m: m(x).square().mean(), probes=2)
                model(x).square().mean().backward()
                if bends:
                    curvature(model, lambda m: m(x).square().mean(), probes=2)
                optimizer.step()
        return watcher.history.steps()["grad_norm"].tolist(), len(watcher.history.events())

    assert norms(bends=True) == norms(bends=False)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inside_no_grad(mode):
    """It works inside a validation loop that records no graphs."""
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    with mode():
        assert curvature({"x": x}, lambda: x.square().sum()).trace == 4.0


def test_attention_is_computed_so_that_it_bends():
    """A loss given as a function uses the attention kernel with a second derivative."""
    torch.manual_seed(0)
    model, x = nn.MultiheadAttention(4, 2, batch_first=True), torch.randn(2, 5, 4)
    found = curvature(model, lambda m: m(x, x, x, need_weights=False)[0].square().mean(), probes=0)
    assert found.converged
    assert math.isnan(found.trace)
    assert "trace" not in str(found)


def test_fused_attention_in_a_tensor():
    """A loss whose graph holds fused attention is refused, with the kernel to take instead."""
    model, x = nn.MultiheadAttention(4, 2, batch_first=True), torch.randn(2, 5, 4)
    loss = model(x, x, x, need_weights=False)[0].square().mean()
    with pytest.raises(RuntimeError, match=r"second time: .* not implemented.*SDPBackend\.MATH"):
        curvature(model, loss)


def test_graph_that_is_gone():
    """A loss after its backward is refused, with three ways out."""
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = x.square().sum()
    loss.backward()
    with pytest.raises(RuntimeError, match=r"freed by a backward\(\).*retain_graph=True"):
        curvature({"x": x}, loss)


def test_buffers_return_after_an_error():
    """Running statistics are as before even where the loss cannot be differentiated twice."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return gradient * 2

    model, x = nn.BatchNorm1d(3), torch.randn(5, 3)
    with pytest.raises(RuntimeError, match="cannot differentiate this loss a second time"):
        curvature(model, lambda m: Once.apply(m(x)).square().mean())
    assert torch.equal(model.running_mean, torch.zeros(3))
    assert model.num_batches_tracked == 0


def test_backward_that_detaches():
    """A backward that hides from the second differentiation makes no symmetric Hessian."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            return a * b

        @staticmethod
        def backward(ctx, gradient):
            a, b = ctx.saved_tensors
            return gradient * b.detach(), gradient * a

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(3, 4)), torch.randn(5, 3)
    with pytest.raises(RuntimeError, match="symmetric matrix: an entry is"):
        curvature(model, lambda: Product.apply(model[0](x), model[1](x)).exp().mean())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(dtype):
    """Half precision is refused, with float32 as the way out."""
    model = nn.Linear(2, 1, dtype=dtype)
    with pytest.raises(TypeError, match=r"weight in torch\..*float\(\)"):
        curvature(model, lambda m: m.weight.sum())


@pytest.mark.parametrize(
    ("loss", "error", "text"),
    [
        (3.0, TypeError, "given an object of type float"),
        (nn.MSELoss(), TypeError, "given an object of type MSELoss"),
        (lambda: 3.0, TypeError, "a function that returns an object of type float"),
        (lambda m: m.weight, ValueError, r"shape \[1, 2\].*loss\.mean"),
        (lambda m: m.weight.sum() * math.nan, ValueError, "loss is nan"),
    ],
)
def test_losses_that_are_none(loss, error, text):
    """What is no loss is refused, and the text says what one looks like."""
    with pytest.raises(error, match=text):
        curvature(nn.Linear(2, 1), loss)


def test_hessian_that_is_not_finite():
    """A second derivative that is infinite is told, not hidden in a NaN."""
    x = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        curvature({"x": x}, lambda: x.pow(1.5).sum())


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"iterations": 0}, ValueError),
        ({"iterations": 1.5}, TypeError),
        ({"tolerance": 0.0}, ValueError),
        ({"tolerance": "fine"}, TypeError),
        ({"probes": -1}, ValueError),
    ],
)
def test_options_out_of_bounds(options, error):
    """An option out of bounds is named."""
    with pytest.raises(error, match=rf"curvature\({next(iter(options))}=\)"):
        curvature(nn.Linear(2, 1), lambda m: m.weight.sum(), **options)


def test_nothing_trainable():
    """A frozen model is refused."""
    with pytest.raises(ValueError, match="requires_grad_"):
        curvature(nn.Linear(2, 1).requires_grad_(False), lambda m: m.weight.sum())


def test_too_few_iterations():
    """Where the products run out, it says that it has not converged."""
    found = curvature(*_quadratic(symmetric(list(range(1, 60)))), iterations=3)
    assert (found.iterations, found.converged) == (3, False)
    assert "not converged" in str(found)


def test_standard_error_covers_the_trace():
    """The trace lies within three standard errors of the estimate for nearly all seeds."""
    matrix = symmetric(np.random.default_rng(0).normal(size=80))
    exact = matrix.trace().item()
    inside, means = 0, []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        found = estimate_trace(matrix.mv, matrix[0], 40, generator)
        inside += abs(found.value - exact) <= 3 * found.stderr
        means.append(found.value)
    assert inside >= 195
    off_diagonal = (matrix**2).sum() - (matrix.diagonal() ** 2).sum()
    assert np.std(means) == pytest.approx(math.sqrt(2 * off_diagonal / 40), rel=0.15)


def test_one_probe_has_no_standard_error():
    """One probe of many columns says nothing about its error."""
    found = estimate_trace(torch.eye(5).mv, torch.zeros(5), 1, torch.Generator())
    assert found.value == 5.0
    assert math.isnan(found.stderr)


def test_lanczos_without_kept_vectors():
    """Three vectors are enough for both ends of a long spectrum, by few products."""
    values = torch.linspace(-3, 1, 2000, dtype=torch.float64) ** 3
    start = torch.randn(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = extreme_eigenvalues(values.mul, start, 300, 1e-3)
    assert found.converged
    assert found.iterations < 150
    assert found.smallest == pytest.approx(-27, rel=1e-5)
    assert found.largest == pytest.approx(1, abs=0.03)


def test_lanczos_of_nothing():
    """An empty matrix has no products to compute."""
    assert extreme_eigenvalues(torch.neg, torch.zeros(0), 5, 0.1).iterations == 0


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_product_of_a_random_network(seed):
    """A product is that of the full Hessian, whatever the vector."""
    model, loss = _mlp()
    vector = torch.randn(38, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    product = HessianProduct(loss(model), list(model.parameters()))
    torch.testing.assert_close(product(vector), _full_hessian(model, loss) @ vector)


def test_two_dtypes_in_one_model():
    """A model in float32 and float64 is measured in float64."""
    a = torch.tensor([1.0], requires_grad=True)
    b = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    found = curvature({"a": a, "b": b}, lambda: (a * a * b * b)[0])
    assert found.largest_eigenvalue == pytest.approx(6)
    assert found.smallest_eigenvalue == pytest.approx(-2)


def test_text():
    """The text has the numbers, their error and the learning rate that they allow."""
    found = curvature(*_quadratic(symmetric([1.0, 2.0, 8.0])))
    assert str(found) == (
        f"Curvature over 3 parameters at loss {found.loss:.4g}: eigenvalues from 1 to 8 "
        "(3 products), trace 11 (exact, 3 products).\n"
        "Plain gradient descent oscillates above a learning rate of 0.25 (2 / largest eigenvalue)."
    )

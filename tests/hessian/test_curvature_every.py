"""CurvatureEvery along trainings whose curvature is known, and the search that it goes on with."""

import math
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gradwatch
from gradwatch.hessian import sampler
from gradwatch.hessian.spectrum import largest_eigenpair

from .matrices import symmetric

PAGE = Path(__file__).parents[2] / "docs" / "curvature.md"
COLUMNS = ["hessian_eigenvalue", "hessian_trace"]


def _random(length, seed=1):
    return torch.randn(length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _train(x, loss, steps, *, lr=0.01, every=1, **options):
    """Descends, and returns the history and the weights after each step."""
    optimizer, weights = torch.optim.SGD([x], lr=lr), []
    asked = gradwatch.CurvatureEvery(every, loss, **options)
    with gradwatch.watch({"x": x}, optimizer, curvature=asked) as watcher:
        for _ in range(steps):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
            weights.append(x.detach().clone())
    return watcher.history, weights


@pytest.fixture
def searches(monkeypatch):
    """The searches for an eigenvalue, as they come."""
    found = []

    def search(*arguments):
        found.append(largest_eigenpair(*arguments))
        return found[-1]

    monkeypatch.setattr(sampler, "largest_eigenpair", search)
    return found


@settings(max_examples=60, deadline=None)
@given(
    eigenvalues=st.lists(st.floats(-100, 100).map(lambda v: round(v, 3)), min_size=1, max_size=24),
    seed=st.integers(0, 2**16),
)
def test_the_largest_of_a_known_spectrum(eigenvalues, seed):
    """The largest eigenvalue is found with its vector, whatever the signs of all are."""
    matrix = symmetric(eigenvalues, seed)
    found = largest_eigenpair(matrix.mv, _random(len(eigenvalues), seed), 200, 1e-6)
    scale = max(map(abs, eigenvalues)) + 1e-12
    assert found.converged
    assert found.value == pytest.approx(max(eigenvalues), abs=1e-5 * scale)
    assert float(torch.linalg.vector_norm(found.vector)) == pytest.approx(1)
    residual = matrix @ found.vector - found.value * found.vector
    assert float(torch.linalg.vector_norm(residual)) <= 2e-6 * scale


def test_as_few_products_as_lanczos():
    """A long spectrum takes hardly more products than the search that cannot be gone on with."""
    values = torch.linspace(-3, 2, 2000, dtype=torch.float64) ** 3
    found = largest_eigenpair(values.mul, _random(2000), 300, 1e-2)
    assert found.converged
    assert found.iterations < 60
    assert found.value == pytest.approx(8, rel=1e-2)


def test_from_its_own_vector_one_product_is_enough():
    """A search that starts where another one ended ends there, with one product."""
    matrix = symmetric(list(range(1, 60)))
    first = largest_eigenpair(matrix.mv, _random(59), 100, 1e-3)
    again = largest_eigenpair(matrix.mv, first.vector, 100, 1e-3)
    assert (again.iterations, again.converged) == (1, True)
    assert again.value == pytest.approx(first.value, rel=1e-9)


def test_too_few_products():
    """Where the products run out, the value is one from below, and it says so."""
    found = largest_eigenpair(symmetric(list(range(1, 60))).mv, _random(59), 3, 1e-6)
    assert (found.iterations, found.converged) == (3, False)
    assert found.value < 59


def test_no_symmetric_matrix():
    """A matrix that is not symmetric is refused, with the usual cause."""
    matrix = torch.triu(torch.ones(9, 9, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="do not belong to a symmetric matrix"):
        largest_eigenpair(matrix.mv, _random(9), 50, 1e-6)


def test_quadratic():
    """On a quadratic both numbers are the same after every step: those of its matrix."""
    matrix, x = symmetric([-1.0, 0.5, 3.0, 7.0]), _random(4).requires_grad_()
    history, _ = _train(x, lambda: 0.5 * x @ matrix @ x, 6, tolerance=1e-9)
    steps = history.steps()
    assert steps["hessian_eigenvalue"].tolist() == pytest.approx([7.0] * 6, rel=1e-8)
    assert steps["hessian_trace"].tolist() == pytest.approx([9.5] * 6, rel=1e-12)


@settings(max_examples=12, deadline=None)
@given(
    factors=st.lists(st.floats(0.1, 5.0), min_size=1, max_size=6),
    every=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_quartic(factors, every, seed):
    """On sum(a x^4) the numbers follow 12 a x^2 of the weights after each step that is due."""
    a, x = torch.tensor(factors, dtype=torch.float64), _random(len(factors), seed).requires_grad_()

    def loss():
        return (a * x**4).sum()

    history, weights = _train(x, loss, 9, lr=0.005, every=every, tolerance=1e-4)
    steps = history.steps()
    for step, after in enumerate(weights, 1):
        row, exact = steps.loc[step], 12 * a * after**2
        if (step - 1) % every:
            assert row[COLUMNS].isna().all()
        else:
            assert row["hessian_eigenvalue"] == pytest.approx(float(exact.max()), rel=1e-2)
            assert row["hessian_trace"] == pytest.approx(float(exact.sum()), rel=1e-9)


def test_another_direction_can_take_over():
    """Where the steepest direction flattens, the number goes over to that which is steepest now."""
    x = torch.full((6,), 0.9, dtype=torch.float64, requires_grad=True)

    def loss():
        return 8 * x[0] ** 4 + 3 * x[1] ** 2 + x[2:].square().sum()

    history, weights = _train(x, loss, 60)
    steepest = [96 * float(after[0]) ** 2 for after in weights]
    assert steepest[0] > 40
    assert steepest[-1] < 5
    seen = history.steps()["hessian_eigenvalue"].tolist()
    assert seen == pytest.approx([max(value, 6.0) for value in steepest], rel=0.02)


def test_network(searches):
    """Along the training of a network the numbers are near the exact ones, for fewer products."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 3)).double()
    x, y = torch.randn(64, 6, dtype=torch.float64), torch.randn(64, 3, dtype=torch.float64)
    optimizer, exact = torch.optim.SGD(model.parameters(), lr=0.1), []

    def loss():
        return (model(x) - y).square().mean()

    asked = gradwatch.CurvatureEvery(10, loss, iterations=60, probes=16)
    with gradwatch.watch(model, optimizer, curvature=asked) as watcher:
        for step in range(61):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
            if step % 10 == 0:
                exact.append(gradwatch.curvature(model, loss, tolerance=1e-6, probes=500))
    steps = watcher.history.steps(COLUMNS).dropna()
    tops = [one.largest_eigenvalue for one in exact]
    assert steps["hessian_eigenvalue"].tolist() == pytest.approx(tops, rel=1e-2)
    traces = [one.trace for one in exact]
    assert steps["hessian_trace"].tolist() == pytest.approx(traces, rel=0.2)
    # The same signs each time: what they are off by is alike at all steps.
    ratios = steps["hessian_trace"].to_numpy() / np.array(traces)
    assert np.ptp(ratios) < 0.05
    first, *later = [search.iterations for search in searches]
    assert len(later) == 6
    assert np.mean(later) < first / 2


def test_edge_of_stability():
    """Of descent without momentum the eigenvalue rises to 2 / learning rate and stays about there."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)
    )
    x = torch.randn(24, 5)
    y = torch.sin(2 * x.sum(1, keepdim=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)

    def loss():
        return (model(x) - y).square().mean()

    asked = gradwatch.CurvatureEvery(50, loss, probes=0)
    with gradwatch.watch(model, optimizer, curvature=asked, buffer_size=4000) as watcher:
        for _ in range(3000):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
    seen = watcher.history.steps()["hessian_eigenvalue"].dropna()
    assert seen.iloc[0] < 0.5 * 2 / 0.2
    assert 0.8 * 2 / 0.2 < seen.iloc[-20:].median() < 1.3 * 2 / 0.2


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((0, torch.ones(1).sum), ValueError, r"CurvatureEvery\(every=\)"),
        ((1.5, torch.ones(1).sum), TypeError, r"CurvatureEvery\(every=\)"),
        ((9, 3.0), TypeError, r"CurvatureEvery\(loss=\) must be a function.*got 3\.0"),
        ((9, torch.ones(())), TypeError, r"CurvatureEvery\(loss=\) must be a function"),
        ((9, nn.MSELoss()), TypeError, r"CurvatureEvery\(loss=\) must be a function"),
        ((9, torch.ones(1).sum, 0), ValueError, r"CurvatureEvery\(iterations=\)"),
        ((9, torch.ones(1).sum, 9, 1.0), ValueError, r"CurvatureEvery\(tolerance=\)"),
        ((9, torch.ones(1).sum, 9, 0.1, -1), ValueError, r"CurvatureEvery\(probes=\)"),
    ],
)
def test_arguments_out_of_bounds(arguments, error, text):
    """An argument that cannot be is named, with what to write."""
    with pytest.raises(error, match=text):
        gradwatch.CurvatureEvery(*arguments)


def test_without_probes_no_trace():
    """probes=0 leaves the trace out."""
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    history, _ = _train(x, lambda: x.square().sum(), 1, probes=0)
    assert history.steps()["hessian_eigenvalue"].tolist() == pytest.approx([2.0])
    assert math.isnan(history.steps()["hessian_trace"].iloc[0])


def test_the_page_runs(tmp_path, capsys):
    """The snippet of docs/curvature.md runs as it stands, and prints numbers at steps 1, 51, 101, 151."""
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    script = tmp_path / "snippet.py"
    script.write_text(snippet, encoding="utf-8")
    watcher = runpy.run_path(str(script))["watcher"]
    seen = watcher.history.steps(COLUMNS).dropna()
    assert seen.index.tolist() == [1, 51, 101, 151]
    assert f"{seen['hessian_trace'].iloc[-1]:.3f}"[:3] in capsys.readouterr().out


def test_a_compiled_model():
    """A function of the model is given the original of a compiled one, which bends."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)), torch.randn(5, 4)
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = []

    def loss(module):
        given.append(module)
        return module(x).square().mean()

    asked = gradwatch.CurvatureEvery(1, loss, iterations=99, tolerance=1e-4)
    with gradwatch.watch(compiled, optimizer, curvature=asked) as watcher:
        compiled(x).square().mean().backward()
        optimizer.step()
    assert given == [model]
    exact = gradwatch.curvature(model, loss, tolerance=1e-6).largest_eigenvalue
    seen = watcher.history.steps()["hessian_eigenvalue"].tolist()
    assert seen == pytest.approx([exact], rel=1e-3)

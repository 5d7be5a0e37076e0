"""watch(curvature=): when it is taken, where it ends up, and that no failure of it harms the run."""

import gc
import math
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradwatch
from gradwatch.testing import CapturingSink
from tests.support import zoo
from tests.support.state import identical, snapshot

COLUMNS = ["hessian_eigenvalue", "hessian_trace"]


def _case() -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], Tensor]]:
    case = zoo.mlp()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    batch = case.batch(99)
    return case.model, optimizer, lambda: case.loss(case.model, batch)


def _train(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def _taken(watcher: gradwatch.Watcher) -> list[int]:
    steps = watcher.history.steps(COLUMNS)
    assert (steps["hessian_eigenvalue"].isna() == steps["hessian_trace"].isna()).all()
    return steps.index[steps["hessian_eigenvalue"].notna()].tolist()


@pytest.mark.parametrize("every", [1, 2, 5, 100])
def test_it_is_taken_after_step_1_and_then_every_so_many(every: int) -> None:
    """Steps 1, 1 + every, 1 + 2 every, ... have the numbers, the others NaN."""
    model, optimizer, loss = _case()
    calls = []

    def counted() -> Tensor:
        calls.append(1)
        return loss()

    asked = gradwatch.CurvatureEvery(every, counted, iterations=2, probes=1)
    with gradwatch.watch(model, optimizer, curvature=asked) as watcher:
        _train(optimizer, loss, 11)
    assert _taken(watcher) == list(range(1, 12, every))
    assert len(calls) == len(_taken(watcher))


def test_the_numbers_are_those_of_curvature_after_the_step() -> None:
    """What is recorded is what gradwatch.curvature says of the weights that the step has left."""
    model, optimizer, loss = _case()
    asked = gradwatch.CurvatureEvery(3, loss, iterations=200, tolerance=1e-4, probes=2000)
    sink, exact = CapturingSink(), []
    with gradwatch.watch(model, optimizer, curvature=asked, sinks=[sink]) as watcher:
        for step in range(7):
            _train(optimizer, loss, 1)
            if step % 3 == 0:
                exact.append(gradwatch.curvature(model, loss, tolerance=1e-6, probes=2000))
    steps = watcher.history.steps(COLUMNS).dropna()
    tops = [one.largest_eigenvalue for one in exact]
    assert steps["hessian_eigenvalue"].tolist() == pytest.approx(tops, rel=1e-3)
    assert steps["hessian_trace"].tolist() == pytest.approx([e.trace for e in exact], rel=1e-3)
    delivered = [record.hessian_eigenvalue for record in sink.steps]
    assert [one for one in delivered if one == one] == steps["hessian_eigenvalue"].tolist()
    assert watcher.last is not None
    assert watcher.last.hessian_trace == steps["hessian_trace"].iloc[-1]


def test_live_and_loaded_are_the_same(tmp_path: Path) -> None:
    """The folder of the run has the same columns with the same numbers."""
    pytest.importorskip("pyarrow")
    model, optimizer, loss = _case()
    asked = gradwatch.CurvatureEvery(4, loss, iterations=3, probes=2)
    folder = tmp_path / "run"
    with gradwatch.watch(model, optimizer, curvature=asked, run_dir=folder) as watcher:
        _train(optimizer, loss, 10)
    loaded = gradwatch.load(folder)
    assert loaded.steps().equals(watcher.history.steps())
    assert loaded.steps(COLUMNS).notna().sum().tolist() == [3, 3]
    assert "CurvatureEvery(every=4, iterations=3" in (folder / "meta.json").read_text(
        encoding="utf-8"
    )


def test_a_folder_from_before_is_read_and_gone_on_with(tmp_path: Path) -> None:
    """A folder without the columns has NaN there; a run that goes on in it adds numbers."""
    pq = pytest.importorskip("pyarrow.parquet")
    model, optimizer, loss = _case()
    with gradwatch.watch(model, optimizer, run_dir=tmp_path / "run") as first:
        _train(optimizer, loss, 5)
        state = first.state_dict()
        _train(optimizer, loss, 2)
    for part in (tmp_path / "run" / "steps").glob("*.parquet"):
        pq.write_table(pq.ParquetFile(part).read().drop_columns(COLUMNS), part)
    before = gradwatch.load(tmp_path / "run")
    assert before.steps().equals(first.history.steps())
    asked = gradwatch.CurvatureEvery(2, loss, iterations=3, probes=2)
    second = gradwatch.watch(model, optimizer, curvature=asked, run_dir=tmp_path / "run")
    second.load_state_dict(state)
    with second:
        _train(optimizer, loss, 4)
    steps = gradwatch.load(tmp_path / "run").steps()
    assert steps.index.tolist() == list(range(1, 10))
    assert steps.index[steps["hessian_trace"].notna()].tolist() == [7, 9] == _taken(second)


def test_of_several_optimizers_the_first_counts() -> None:
    """It stands in the rows of the first optimizer, for all parameters of the model."""
    model, _, loss = _case()
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    second = torch.optim.SGD(model[2:].parameters(), lr=0.1)
    asked = gradwatch.CurvatureEvery(2, loss, iterations=200, tolerance=1e-5, probes=0)
    with gradwatch.watch(model, [first, second], curvature=asked) as watcher:
        for _ in range(3):
            loss().backward()
            second.step()
            first.step()
            model.zero_grad()
    steps = watcher.history.steps()
    there = steps[steps["hessian_eigenvalue"].notna()]
    assert there["optimizer"].tolist() == ["SGD", "SGD"]
    exact = gradwatch.curvature(model, loss, tolerance=1e-6, probes=0).largest_eigenvalue
    assert there["hessian_eigenvalue"].iloc[-1] == pytest.approx(exact, rel=1e-4)


def test_a_managed_loop_takes_it_once_per_window() -> None:
    """With accumulate=3 it follows the steps, not the micro-batches, and no gradient of it counts."""
    norms = []
    for bends in (False, True):
        model, optimizer, loss = _case()
        asked = gradwatch.CurvatureEvery(2, loss, iterations=3, probes=1) if bends else None
        with gradwatch.watch(model, optimizer, accumulate=3, curvature=asked) as watcher:
            for _ in range(9):
                watcher.backward(loss())
                watcher.step()
        steps = watcher.history.steps()
        assert steps["micro_batches"].tolist() == [3, 3, 3]
        norms.append(steps["grad_norm"].tolist())
    assert _taken(watcher) == [1, 3]
    assert norms[0] == norms[1]


def test_a_closure_is_evaluated_first() -> None:
    """Under LBFGS it is taken once the step is over, not at each evaluation of the closure."""
    model, _, loss = _case()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    asked = gradwatch.CurvatureEvery(1, loss, iterations=200, tolerance=1e-5, probes=0)
    with gradwatch.watch(model, optimizer, curvature=asked) as watcher:
        optimizer.step(closure)
    exact = gradwatch.curvature(model, loss, tolerance=1e-6, probes=0).largest_eigenvalue
    seen = watcher.history.steps()["hessian_eigenvalue"].tolist()
    assert seen == pytest.approx([exact], rel=1e-4)


def _fails() -> Tensor:
    raise ConnectionError("no batch there")


def _once() -> Callable[[nn.Module], Tensor]:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * 2

    return lambda model: Once.apply(model(torch.ones(2, 6))).square().sum()


def _backward(model: nn.Module) -> Tensor:
    loss = model(torch.ones(2, 6)).sum()
    loss.backward(retain_graph=True)
    return loss.square()


@pytest.mark.parametrize("acts", [False, True], ids=["watches", "clips"])
@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (_fails, "ConnectionError: no batch there"),
        (lambda: 3.0, "TypeError: .*returns an object of type float"),
        (lambda model: model(torch.ones(2, 6)), r"ValueError: The loss has the shape \[2, 3\]"),
        (_once(), "RuntimeError: .*cannot differentiate this loss a second time"),
        (_backward, r"RuntimeError: .*ran a backward itself.*leave out loss\.backward"),
    ],
)
def test_a_loss_that_fails_is_told_once_and_harms_nothing(loss: Any, text: str, acts: bool) -> None:
    """One warning, NaN from there on, and a training with the same weights, gradients and records."""
    results = []
    for asked in (None, gradwatch.CurvatureEvery(2, loss)):
        model, optimizer, real = _case()
        options = {"clip": 0.1} if acts else {}
        watcher = gradwatch.watch(model, optimizer, curvature=asked, **options)
        with warnings.catch_warnings(record=True) as caught, watcher:
            warnings.simplefilter("always")
            _train(optimizer, real, 6)
        results.append((snapshot(model), [p.grad for p in model.parameters()]))
        norms = watcher.history.steps()["grad_norm"].tolist()
        results[-1] = (*results[-1], norms, watcher.history.steps()["micro_batches"].tolist())
    assert [str(w.message) for w in caught if "curvature from step 1 on" in str(w.message)]
    assert len(caught) == 1
    with pytest.raises(gradwatch.GradwatchWarning, match=text):
        raise caught[0].message  # type: ignore[misc]
    assert _taken(watcher) == []
    assert identical(*results)


def test_a_loss_that_is_not_finite_for_a_while() -> None:
    """A NaN stands for a loss that is not finite; it is told once, and later numbers are there."""
    model, optimizer, loss = _case()
    factors = iter([1.0, math.nan, math.inf, 1.0])
    asked = gradwatch.CurvatureEvery(1, lambda: loss() * next(factors), iterations=3, probes=1)
    with (
        pytest.warns(
            gradwatch.GradwatchWarning, match="no curvature at step 2.*loss is nan"
        ) as told,
        gradwatch.watch(model, optimizer, curvature=asked) as watcher,
    ):
        _train(optimizer, loss, 4)
    assert _taken(watcher) == [1, 4]
    assert len(told) == 1


def test_warnings_that_are_errors_do_not_stop_the_training() -> None:
    """Where the user's filters make errors of warnings, the failure is logged."""
    model, optimizer, loss = _case()
    with gradwatch.watch(
        model, optimizer, curvature=gradwatch.CurvatureEvery(1, _fails)
    ) as watcher:
        _train(optimizer, loss, 3)
    assert len(watcher.history) == 3


def test_no_graph_stays_behind() -> None:
    """The graph of the loss is gone as soon as the numbers are there, and when it fails."""
    model, optimizer, loss = _case()
    kept: list[weakref.ref[Tensor]] = []

    def remembered() -> Tensor:
        value = loss()
        kept.append(weakref.ref(value))
        if len(kept) == 3:
            raise MemoryError("full")
        return value

    gc.collect()
    gc.disable()
    try:
        asked = gradwatch.CurvatureEvery(1, remembered, iterations=3, probes=1)
        with gradwatch.watch(model, optimizer, curvature=asked) as watcher:
            for _ in range(2):
                _train(optimizer, loss, 1)
                assert kept[-1]() is None
            with pytest.warns(gradwatch.GradwatchWarning, match="MemoryError: full"):
                _train(optimizer, loss, 1)
            assert kept[-1]() is None
    finally:
        gc.enable()
    assert _taken(watcher) == [1, 2]


def test_its_cost_is_in_the_overhead() -> None:
    """watcher.overhead counts the seconds that the loss takes."""
    model, optimizer, loss = _case()
    spent = []

    def slow() -> Tensor:
        began = time.perf_counter()
        value = loss()
        while time.perf_counter() - began < 0.01:
            value = loss()
        spent.append(time.perf_counter() - began)
        return value

    asked = gradwatch.CurvatureEvery(1, slow, iterations=1, probes=0)
    with gradwatch.watch(model, optimizer, curvature=asked) as watcher:
        _train(optimizer, loss, 3)
    assert watcher.overhead.seconds >= sum(spent) >= 0.03


def test_inside_the_backward_it_is_refused() -> None:
    """Where the optimizer steps inside the backward it is told once that nothing can be taken."""
    model, _, loss = _case()
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    watcher = gradwatch.watch(model, curvature=gradwatch.CurvatureEvery(1, loss))

    def train() -> None:
        with watcher:
            for _ in range(3):
                loss().backward()
                model.zero_grad()

    with pytest.warns(gradwatch.GradwatchWarning, match="steps inside the backward") as told:
        train()
    assert _taken(watcher) == []
    assert len(told) == 1


def _by_hand(x: Tensor, watcher: gradwatch.Watcher) -> None:
    """A loop that updates the weights by no torch optimizer."""
    with watcher:
        for _ in range(3):
            x.square().sum().backward()
            with torch.no_grad():
                x.sub_(0.1 * x.grad)


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({"curvature": gradwatch.CurvatureEvery(1, torch.ones(1).sum)}, r"curvature=\)"),
        ({"statistics": ["max", "update_ratio"]}, r"statistics=\['update_ratio'\]\)"),
        ({"statistics": ["weight_norm"]}, r"statistics=\['weight_norm'\]\)"),
    ],
)
def test_what_needs_an_optimizer_says_so(options: dict[str, Any], asked: str) -> None:
    """Where no optimizer ever steps, what belongs to a step is told, once, to have been asked in vain."""
    x = torch.ones(3, requires_grad=True)
    watcher = gradwatch.watch({"x": x}, **options)
    with pytest.warns(gradwatch.GradwatchWarning, match=f"{asked} took nothing: no torch") as told:
        _by_hand(x, watcher)
    assert len(watcher.history) == 3
    assert len(told) == 1


def test_a_watcher_that_was_never_entered_says_so() -> None:
    """report() of a watcher without its `with` says what to write, and after it no more."""
    x = torch.ones(3, requires_grad=True)
    watcher = gradwatch.watch({"x": x})
    x.sum().backward()
    assert "with gradwatch.watch(...) as watcher:" in " ".join(str(watcher.report()).split())
    with watcher:
        assert "never entered" not in str(watcher.report())
    assert "never entered" not in str(watcher.report())


@pytest.mark.parametrize(
    ("model", "curvature", "error", "text"),
    [
        (nn.Linear(2, 1), 200, TypeError, r"watch\(curvature=\) must be a CurvatureEvery.*got 200"),
        (nn.Linear(2, 1), gradwatch.CurvatureEvery, TypeError, "must be a CurvatureEvery"),
        (
            nn.Linear(2, 1).bfloat16(), gradwatch.CurvatureEvery(9, _fails), TypeError,
            r"weight in torch\.bfloat16",
        ),
        (
            nn.Linear(2, 1).requires_grad_(False), gradwatch.CurvatureEvery(9, _fails), ValueError,
            "requires_grad_",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_at_once(
    model: nn.Module, curvature: Any, error: type[Exception], text: str, tmp_path: Path
) -> None:
    """What can never work is refused by watch(), before a folder is made."""
    with pytest.raises(error, match=text):
        gradwatch.watch(model, curvature=curvature, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()

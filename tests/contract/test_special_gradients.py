"""Norms of fp16, huge, sparse, scaled and empty gradients, of frozen and thawed parameters; other statistics."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradwatch
from tests.support import float64, zoo
from tests.support.state import identical, snapshot

from .tables import STEPS, all_norms, rows_of, sgd


@all_norms
def test_sparse_adam_norms_sum_the_rows_that_repeat(p: float) -> None:
    """A sparse gradient with repeated rows has the norm of its dense sum, under SparseAdam."""
    case = zoo.sparse_only()
    optimizer = torch.optim.SparseAdam(case.model.parameters(), lr=0.1)
    expected = []
    with gradwatch.watch(
        case.model, optimizer, clip=gradwatch.ClipByNorm(math.inf, norm_type=p)
    ) as watcher:
        for index in range(STEPS):
            case.loss(case.model, case.batch(index)).backward()
            expected.append(float64.norm(case.model.table.weight.grad, p))
            optimizer.step()
            optimizer.zero_grad()
    assert list(watcher.history.steps()["grad_norm"]) == pytest.approx(expected, rel=1e-5)


def _fp16_leaf(value: float, count: int) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(count, dtype=torch.float16, requires_grad=True)
    return weight, torch.full((count,), value, dtype=torch.float16)


@pytest.mark.parametrize(
    ("p", "expected"), [(1.0, 1e7), (2.0, 1e5), (math.inf, 1e3)], ids=["p=1", "p=2", "p=inf"]
)
def test_fp16_norms_beyond_65504_are_finite(p: float, expected: float) -> None:
    """Ten thousand fp16 gradients of 1000 have the norm 1e5 (1e7, 1e3), which fp16 cannot hold, and are no overflow."""
    weight, gradient = _fp16_leaf(1000.0, 10_000)
    optimizer = torch.optim.SGD([weight], lr=0.0)
    policy = gradwatch.ClipByNorm(math.inf, norm_type=p)
    with gradwatch.watch({"w": weight}, optimizer, clip=policy) as watcher:
        for _ in range(STEPS):
            (weight * gradient).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert list(watcher.history.steps()["grad_norm"]) == pytest.approx([expected] * STEPS, rel=1e-4)
    assert list(watcher.history.parameters()["grad_norm"]) == pytest.approx(
        [expected] * STEPS, rel=1e-4
    )
    assert watcher.history.events().empty


def test_fp16_gradients_are_clipped_with_their_true_norm() -> None:
    """Clipping fp16 gradients whose norm is beyond 65504 leaves the limit, not zeros."""
    weight, gradient = _fp16_leaf(1000.0, 10_000)
    optimizer = torch.optim.SGD([weight], lr=0.0)
    with gradwatch.watch({"w": weight}, optimizer, clip=10.0) as watcher:
        (weight * gradient).sum().backward()
        optimizer.step()
    row = watcher.history.steps().loc[1]
    assert float64.norm(weight.grad) == pytest.approx(10.0, rel=2e-3)
    assert row["grad_norm_clipped"] == pytest.approx(10.0, rel=2e-3)
    assert row["clip_coef"] == pytest.approx(1e-4, rel=1e-3)


def test_large_float64_gradients_keep_their_norm() -> None:
    """float64 gradients of 1e39, beyond float32, are measured in float64."""
    weight = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.0)
    with gradwatch.watch({"w": weight}, optimizer) as watcher:
        (weight * 1e39).sum().backward()
        optimizer.step()
    assert watcher.history.steps().loc[1, "grad_norm"] == pytest.approx(2e39)


class _Parts(nn.Module):
    """`used` in every step, `frozen` until it is thawed, `spare` never."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.used = nn.Linear(6, 4)
        self.frozen = nn.Linear(4, 3)
        self.spare = nn.Linear(2, 2)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(torch.tanh(self.used(x)))


@pytest.fixture(params=["from_the_start", "added_late"])
def thawing(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Five steps, the frozen part thawed after the second; its parameters in the optimizer early or late."""
    model, data = _Parts(), zoo.mlp()
    early = request.param == "from_the_start"
    parts = model.parameters() if early else (p for p in model.parameters() if p.requires_grad)
    optimizer = torch.optim.SGD(parts, lr=0.1)
    expected = []
    with gradwatch.watch(model, optimizer) as watcher:
        for index in range(STEPS):
            if index == 2:
                model.frozen.requires_grad_(True)
                if not early:
                    optimizer.add_param_group({"params": list(model.frozen.parameters())})
            data.loss(model, data.batch(index)).backward()
            expected.append(float64.gradient_norms(dict(model.named_parameters())))
            optimizer.step()
            optimizer.zero_grad()
    return {"watcher": watcher, "expected": expected, "model": model}


def test_frozen_unused_and_thawed_parameters(thawing: dict[str, Any]) -> None:
    """A frozen or unused parameter has no row; a thawed one is in the table and in the total from its first gradient."""
    watcher, expected = thawing["watcher"], thawing["expected"]
    assert "frozen.weight" not in expected[1]
    assert "frozen.weight" in expected[2]
    steps = watcher.history.steps()
    for step in range(1, STEPS + 1):
        assert rows_of(watcher, step) == pytest.approx(expected[step - 1], rel=1e-5)
        assert steps.loc[step, "grad_norm"] == pytest.approx(
            float64.total(expected[step - 1]), rel=1e-5
        )


def test_an_unused_parameter_is_told_and_a_frozen_one_never(
    thawing: dict[str, Any],
) -> None:
    """A `no_gradient` event names the trainable parameters without a gradient, never the frozen ones."""
    events = thawing["watcher"].history.events()
    events = events[events["kind"] == "no_gradient"]
    named = " ".join([*events["parameter"], *events["message"]])
    assert "spare" in named
    assert "frozen" not in named
    assert "used.weight" not in named


def test_a_thawed_parameter_is_clipped_too() -> None:
    """After a thaw the total that ClipByNorm limits is that of all gradients, as with clip_grad_norm_."""
    results = []
    for watched in (True, False):
        model, data = _Parts(), zoo.mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        watcher = gradwatch.watch(model, optimizer, clip=0.05) if watched else None
        with watcher or torch.enable_grad():
            for index in range(STEPS):
                if index == 2:
                    model.frozen.requires_grad_(True)
                data.loss(model, data.batch(index)).backward()
                if watcher is None:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
                optimizer.step()
                optimizer.zero_grad()
        results.append(snapshot(model))
    assert identical(*results)


def test_a_parameter_frozen_in_the_middle_leaves_the_table() -> None:
    """A parameter that is frozen and whose gradient is dropped has no row from then on."""
    case = zoo.mlp()
    optimizer = sgd(case)
    with gradwatch.watch(case.model, optimizer) as watcher:
        for index in range(4):
            if index == 2:
                case.model[0].requires_grad_(False)
            case.loss(case.model, case.batch(index)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert "0.weight" in rows_of(watcher, 2)
    assert "0.weight" not in rows_of(watcher, 3)
    assert set(rows_of(watcher, 4)) == {"2.weight", "2.bias", "4.weight", "4.bias"}


@pytest.mark.parametrize("discover", [False, True], ids=["named", "found"])
def test_norms_of_an_optimizer_over_a_part_of_the_model(discover: bool) -> None:
    """grad_norm is over the parameters of that optimizer, also where the model has more."""
    case = zoo.mlp()
    optimizer = torch.optim.SGD(case.model[4].parameters(), lr=0.1)
    expected = []
    with gradwatch.watch(case.model, None if discover else optimizer) as watcher:
        for index in range(STEPS):
            case.model.zero_grad()
            case.loss(case.model, case.batch(index)).backward()
            expected.append(
                float64.total(float64.gradient_norms(dict(case.model[4].named_parameters())))
            )
            optimizer.step()
    assert list(watcher.history.steps()["grad_norm"]) == pytest.approx(expected, rel=1e-5)


def _true_norms(case: zoo.Case, loss: Tensor) -> float:
    grads = torch.autograd.grad(loss, list(case.model.parameters()), retain_graph=True)
    return float64.total(float64.norms({str(i): grad for i, grad in enumerate(grads)}))


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("how", ["scaled", "unscaled_by_the_loop", "managed"])
def test_norms_under_a_grad_scaler_are_in_true_units(how: str, fused: bool) -> None:
    """With a GradScaler (2**10) every norm is that of the unscaled gradients, before and after the clip."""
    case = zoo.mlp()
    optimizer = torch.optim.AdamW(case.model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    expected = []
    own = how == "unscaled_by_the_loop"
    with gradwatch.watch(
        case.model, optimizer, scaler=scaler, clip=None if own else 0.1
    ) as watcher:
        for index in range(STEPS):
            loss = case.loss(case.model, case.batch(index))
            expected.append(_true_norms(case, loss))
            if how == "managed":
                watcher.backward(loss)
                assert watcher.step() is True
                continue
            scaler.scale(loss).backward()
            if own:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(case.model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    steps = watcher.history.steps()
    assert list(steps["grad_norm"]) == pytest.approx(expected, rel=1e-4)
    limited = [min(norm, 0.1) for norm in expected]
    assert list(steps["grad_norm_clipped"]) == pytest.approx(limited, rel=1e-4)
    assert set(steps["loss_scale"]) == {1024.0}
    assert set(steps["outcome"]) == {"applied"}


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_step_that_the_grad_scaler_drops_is_a_row(fused: bool) -> None:
    """An overflow under a GradScaler leaves one row `skipped_scaler`, and the next rows are right."""
    case = zoo.mlp()
    optimizer = torch.optim.AdamW(case.model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    expected = []
    with gradwatch.watch(case.model, optimizer, scaler=scaler) as watcher:
        for index in range(4):
            loss = case.loss(case.model, case.batch(index))
            expected.append(_true_norms(case, loss))
            scaler.scale(loss * math.inf if index == 1 else loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    steps = watcher.history.steps()
    assert list(steps["outcome"]) == ["applied", "skipped_scaler", "applied", "applied"]
    assert list(steps["micro_batches"]) == [1, 1, 1, 1]
    for step in (1, 3, 4):
        assert steps.loc[step, "grad_norm"] == pytest.approx(expected[step - 1], rel=1e-4)


def test_a_bad_gradient_in_an_unfinished_window_is_no_step() -> None:
    """Under a GradScaler too, a window that is never stepped leaves no row, though its gradient was infinite."""
    case = zoo.mlp()
    optimizer = torch.optim.AdamW(case.model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with gradwatch.watch(case.model, optimizer, scaler=scaler, accumulate=2) as watcher:
        for index in range(3):
            loss = case.loss(case.model, case.batch(index))
            watcher.backward(loss * math.inf if index == 2 else loss)
            watcher.step()
    assert list(watcher.history.steps()["outcome"]) == ["applied"]


def test_the_other_statistics_equal_the_reference() -> None:
    """max, mean, std, zeros and weight_norm are those of the gradient and the weight before the step; `every` thins them."""
    case = zoo.mlp()
    optimizer = sgd(case)
    expected: list[dict[str, dict[str, float]]] = []
    names = ("norm", "max", "mean", "std", "zeros", "weight_norm", "update_ratio")
    with gradwatch.watch(case.model, optimizer, statistics=names, every=2) as watcher:
        for index in range(4):
            case.loss(case.model, case.batch(index)).backward()
            before = {n: float64.widen(p) for n, p in case.model.named_parameters()}
            grads = {n: float64.widen(p.grad) for n, p in case.model.named_parameters()}
            optimizer.step()
            optimizer.zero_grad()
            expected.append(
                {
                    name: {
                        "max": float(grad.abs().max()),
                        "mean": float(grad.mean()),
                        "std": float(grad.std(correction=0)),
                        "zeros": float((grad == 0).double().mean()),
                        "weight_norm": float(before[name].norm()),
                        "update_ratio": float(
                            (
                                float64.widen(dict(case.model.named_parameters())[name])
                                - before[name]
                            ).norm()
                            / before[name].norm()
                        ),
                    }
                    for name, grad in grads.items()
                }
            )
    table = watcher.history.parameters()
    for row in table.itertuples():
        for key, value in expected[row.step - 1][row.parameter].items():
            got = getattr(row, key)
            if row.step % 2 == 0:
                assert math.isnan(got)
            else:
                assert got == pytest.approx(value, rel=1e-4, abs=1e-7), (
                    row.step,
                    row.parameter,
                    key,
                )


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@all_norms
def test_a_parameter_without_elements(p: float) -> None:
    """A parameter of no elements has the norm 0 in every norm, and harms nothing."""
    layer = nn.Linear(0, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    policy = gradwatch.ClipByNorm(math.inf, norm_type=p)
    with gradwatch.watch(layer, optimizer, clip=policy) as watcher:
        layer(torch.zeros(2, 0)).sum().backward()
        optimizer.step()
    assert rows_of(watcher, 1) == pytest.approx(
        {"weight": 0.0, "bias": {1.0: 6.0, 2.0: 12**0.5}.get(p, 2.0)}
    )

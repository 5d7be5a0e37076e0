"""Overflow, exploding norms, missing gradients."""

import math

import pytest
import torch

import gradwatch
from tests.support.optimizers import DENSE

from .poison import three_leaves, train_with_poison


@pytest.mark.parametrize("on_nonfinite", ["record", "skip", "raise"])
@pytest.mark.parametrize(
    ("values", "expected"),
    [([1e30] * 4, 2e30), ([3e38] * 3, 3e38 * math.sqrt(3)), ([2e19] * 100, 2e20)],
    ids=["1e30", "3e38", "squares_only"],
)
def test_overflow(values: list[float], expected: float, on_nonfinite: str) -> None:
    """Finite gradients with an infinite float32 norm: an event, the true norm, and a step that is applied."""
    weight = torch.zeros(len(values), requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1e-30)
    with gradwatch.watch({"w": weight}, optimizer, on_nonfinite=on_nonfinite) as watcher:
        (weight * torch.tensor(values)).sum().backward()
        optimizer.step()
    row = watcher.history.steps().loc[1]
    events = watcher.history.events()
    overflows = not math.isfinite(float(torch.tensor(values).norm()))
    assert row["grad_norm"] == pytest.approx(expected, rel=1e-5)
    assert row["outcome"] == "applied"
    assert row["nonfinite_parameters"] == 0
    assert list(events["kind"]) == (["overflow"] if overflows else [])
    assert list(watcher.history.parameters()["grad_norm"]) == pytest.approx([expected], rel=1e-5)
    assert weight.ne(0).all()


def test_overflow_of_the_total_alone() -> None:
    """Two parameters, each norm within float32 and the total beyond it: the total is right and an event tells."""
    leaves = {name: torch.zeros(1, requires_grad=True) for name in "ab"}
    optimizer = torch.optim.SGD(list(leaves.values()), lr=0.0)
    policy = gradwatch.ClipByNorm(math.inf, norm_type=1)
    with gradwatch.watch(leaves, optimizer, clip=policy) as watcher:
        sum((leaf * 3e38).sum() for leaf in leaves.values()).backward()
        optimizer.step()
    assert watcher.history.steps().loc[1, "grad_norm"] == pytest.approx(6e38, rel=1e-5)
    assert list(watcher.history.events()["kind"]) == ["overflow"]


def test_overflow_event_says_the_norm() -> None:
    """The overflow event carries the parameter and the true norm."""
    leaves = three_leaves()
    optimizer = torch.optim.SGD(list(leaves.values()), lr=0.0)
    with gradwatch.watch(leaves, optimizer) as watcher:
        (leaves["a"].sum() + (leaves["b"] * 1e30).sum()).backward()
        optimizer.step()
    event = watcher.history.events().iloc[0]
    assert event["kind"] == "overflow"
    assert event["value"] == pytest.approx(1e30 * math.sqrt(10), rel=1e-5)
    assert (event["nan_count"], event["inf_count"]) == (0, 0)


def test_exploding_is_off_by_default() -> None:
    """Without exploding_norm a large finite norm is no event."""
    weight = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.0)
    with gradwatch.watch({"w": weight}, optimizer) as watcher:
        (weight * 1e9).sum().backward()
        optimizer.step()
    assert watcher.history.events().empty


@pytest.mark.parametrize("clip", [None, 0.5])
def test_exploding_norm(clip: float | None) -> None:
    """A norm above exploding_norm, before the clip, is an event with the norm; one at or below it is none."""
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.0)
    with gradwatch.watch({"w": weight}, optimizer, clip=clip, exploding_norm=5.0) as watcher:
        for value in (1.0, 5.0, 5.5, 4.0, 80.0):
            (weight * value).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    events = watcher.history.events()
    assert list(events["kind"]) == ["exploding", "exploding"]
    assert list(events["step"]) == [3, 5]
    assert list(events["value"]) == pytest.approx([5.5, 80.0])


def test_no_gradient_names_the_parameter_that_got_none() -> None:
    """A trainable parameter of the optimizer that got no gradient is told; the others are not."""
    leaves = three_leaves()
    optimizer = torch.optim.SGD(list(leaves.values()), lr=0.1)
    with gradwatch.watch(leaves, optimizer) as watcher:
        (leaves["a"].sum() + leaves["c"].sum()).backward()
        optimizer.step()
    events = watcher.history.events()
    assert set(events["kind"]) == {"no_gradient"}
    assert list(events["parameter"]) == ["b"]
    assert list(events["step"]) == [1]


def test_no_gradient_does_not_flood() -> None:
    """A parameter that never gets a gradient is not told anew at every step."""
    leaves = three_leaves()
    optimizer = torch.optim.SGD(list(leaves.values()), lr=0.1)
    with gradwatch.watch(leaves, optimizer) as watcher:
        for _ in range(50):
            (leaves["a"].sum() + leaves["c"].sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len(watcher.history.events()) < 5


def test_a_healthy_run_has_no_events() -> None:
    """Five ordinary steps leave no event, and the event table keeps its columns."""
    _, watcher = train_with_poison(DENSE["AdamW"], clip=1.0, on_nonfinite="skip")
    events = watcher.history.events()
    assert events.empty
    assert {"step", "micro_batch", "kind", "parameter", "module", "value", "rank", "message",
            "nan_count", "inf_count"} <= set(events.columns)  # fmt: skip
    assert list(watcher.events) == []


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["positive", "negative"])
@pytest.mark.parametrize(
    ("dtype", "element", "norm_type"),
    [
        (torch.float32, 1e20, 2.0),
        (torch.float16, 5e4, 2.0),
        (torch.bfloat16, 1e20, 2.0),
        (torch.float32, 1e30, 3.0),
    ],
    ids=["float32", "float16", "bfloat16", "another p"],
)
def test_a_clip_that_multiplies_by_zero_is_a_clip(
    dtype: torch.dtype, element: float, norm_type: float, sign: float
) -> None:
    """clip_grad_norm_ with an infinite norm leaves zeros: the step has its micro-batch and its norm."""
    weight = torch.zeros(4, dtype=dtype, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    with gradwatch.watch({"w": weight}, optimizer) as watcher:
        (weight * torch.full((4,), sign * element, dtype=dtype)).sum().backward()
        torch.nn.utils.clip_grad_norm_([weight], 1.0, norm_type)
        assert weight.grad is not None
        assert not weight.grad.any()
        optimizer.step()
    row = watcher.history.steps().loc[1]
    assert row["micro_batches"] == 1
    assert row["grad_norm"] == pytest.approx(2 * element, rel=1e-2)
    assert (row["grad_norm_clipped"], row["clip_coef"], row["clipped"]) == (0.0, 0.0, True)
    told = ["overflow"] if element > 1e19 else []
    assert list(watcher.history.events()["kind"]) == told


@pytest.mark.parametrize("clip", [0.0, -0.0])
def test_a_factor_of_zero_is_a_clip_where_a_sign_shows_it(clip: float) -> None:
    """Gradients multiplied by 0 keep their signs, and zero_grad() writes none."""
    weight = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    with gradwatch.watch({"w": weight}, optimizer) as watcher:
        (weight * torch.tensor([1.0, -2.0, 3.0, -4.0])).sum().backward()
        with torch.no_grad():
            weight.grad.mul_(clip)  # type: ignore[union-attr]
        optimizer.step()
    row = watcher.history.steps().loc[1]
    assert (row["micro_batches"], row["clip_coef"], row["clipped"]) == (1, 0.0, True)
    assert row["grad_norm"] == pytest.approx(30**0.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_zeros_over_bad_gradients_keep_their_event(bad: float) -> None:
    """A loop that writes zeros over NaN and Inf has thrown them away; events tell what they were."""
    weight = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    with gradwatch.watch({"w": weight}, optimizer) as watcher:
        (weight * torch.tensor([bad, bad])).sum().backward()
        assert weight.grad is not None
        weight.grad.copy_(torch.nan_to_num(weight.grad, nan=0.0, posinf=0.0))
        optimizer.step()
    row = watcher.history.steps().loc[1]
    assert (row["micro_batches"], row["discarded"], row["grad_norm"]) == (0, 1, 0.0)
    event, thrown_away = watcher.events
    kind = "nan" if math.isnan(bad) else "inf"
    assert (event.kind, event.nan_count + event.inf_count) == (kind, 2)
    assert thrown_away.kind == "discarded"

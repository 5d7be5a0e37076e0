"""clip_coef has the sign of what the gradients were multiplied with; norms have none."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gradwatch

Change = Callable[[Tensor, int], None]


def _steps(change: Change | None = None, clip: Any = None, count: int = 6) -> Any:
    x = torch.linspace(-1.0, 2.0, 100).requires_grad_()
    y = torch.linspace(0.5, 1.0, 3).requires_grad_()
    optimizer = torch.optim.SGD([x, y], lr=1e-4)
    with gradwatch.watch({"x": x, "y": y}, optimizer, clip=clip) as watcher:
        for number in range(1, count + 1):
            (x.square().sum() + y.square().sum()).backward()
            for tensor in (x, y):
                if change is not None:
                    change(tensor, number)
            optimizer.step()
            optimizer.zero_grad()
    rows = watcher.history.parameters()
    assert (rows["grad_norm_clipped"] >= 0).all()
    steps = watcher.history.steps()
    expected = steps["clip_coef"].abs() * steps["grad_norm"]
    assert steps["grad_norm_clipped"].tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    return steps


def _in_place(factor: float) -> Change:
    return lambda tensor, number: tensor.grad.mul_(factor)


def _past_the_counter(factor: float) -> Change:
    return lambda tensor, number: tensor.grad.data.mul_(factor)


def _replaced(factor: float) -> Change:
    return lambda tensor, number: setattr(tensor, "grad", tensor.grad * factor)


@pytest.mark.parametrize("factor", [-0.5, -1.0, -3.0, 0.5, 0.0])
@pytest.mark.parametrize("way", [_in_place, _past_the_counter, _replaced])
def test_a_loop_that_multiplies_by_a_negative_number(way: Any, factor: float) -> None:
    """Gradients that are reversed between backward and step have a negative coefficient, and were clipped."""
    steps = _steps(way(factor))
    assert steps["clip_coef"].tolist() == pytest.approx([factor] * 6, rel=1e-5)
    assert steps["clipped"].all()


def test_a_late_turn_is_seen_from_its_second_step_on() -> None:
    """Gradients that are reversed from step 40 on, which is not looked at, are known to be from step 41 on."""

    def change(tensor: Tensor, number: int) -> None:
        if number >= 40:
            tensor.grad.mul_(-0.5)

    coefficients = _steps(change, count=80)["clip_coef"]
    assert (coefficients.loc[:39] == 1.0).all()
    assert coefficients.loc[41:].tolist() == pytest.approx([-0.5] * 40)


def test_noise_turns_no_gradient_round() -> None:
    """Gradients that drown in noise, as in differential privacy, have a positive coefficient."""
    torch.manual_seed(0)

    def change(tensor: Tensor, number: int) -> None:
        tensor.grad.add_(torch.randn_like(tensor), alpha=30.0)

    assert (_steps(change, count=70)["clip_coef"] > 0).all()


class _Factors(gradwatch.ClipByNorm):
    """Multiplies by given factors, whatever the norms are."""

    def __init__(self, factors: Any, scope: str = "global") -> None:
        super().__init__(1.0, scope=scope)
        object.__setattr__(self, "factors", torch.tensor(factors))

    def decide(self, total_norm: Tensor) -> gradwatch.ClipDecision:
        return gradwatch.ClipDecision(coefficient=self.factors)


@pytest.mark.parametrize(
    ("policy", "user", "expected"),
    [
        (_Factors(-0.5), 1.0, -0.5),
        (_Factors(-0.5), 0.5, -0.25),
        (_Factors(-0.5), -0.5, 0.25),
        (_Factors([-0.5, -0.5], "parameter"), 1.0, -0.5),
        (_Factors([-0.5, -0.5], "parameter"), -1.0, 0.5),
        (_Factors([0.5, 0.5], "parameter"), -1.0, -0.5),
    ],
)
def test_policies_that_turn_gradients_round(policy: Any, user: float, expected: float) -> None:
    """The factor of a policy counts with its sign, together with that of the loop."""
    steps = _steps(_in_place(user), policy)
    assert steps["clip_coef"].tolist() == pytest.approx([expected] * 6, rel=1e-5)


def test_of_several_factors_the_larger_part_decides() -> None:
    """With one parameter reversed and one not, the sign is that of the inner product."""
    assert (_steps(None, _Factors([-0.5, 1.0], "parameter"))["clip_coef"] < 0).all()
    assert (_steps(None, _Factors([1.0, -0.5], "parameter"))["clip_coef"] > 0).all()

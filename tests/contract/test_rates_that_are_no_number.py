"""An optimizer that finds its rate by itself has no number in its groups: NaN is recorded."""

import decimal
import fractions
import math

import numpy as np
import pytest
import torch
from torch import nn

import gradwatch


class OwnRate(torch.optim.Optimizer):
    """Has its rate from somewhere else, as transformers' Adafactor with relative steps."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        """Moves every weight by a hundredth of its gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=0.01)


NO_NUMBER = {
    "None": None,
    "text": "auto",
    "digits": "0.1",
    "function": lambda step: 0.1,
    "complex": 1j,
    "complex tensor": torch.tensor(1j),
    "several": torch.tensor([0.1, 0.2]),
    "array": np.array([0.1, 0.2]),
    "tuple": (0.1,),
    "meta": torch.tensor(0.1, device="meta"),
    "beyond float64": 10**400,
}
NUMBER = {
    "tensor": torch.tensor(0.5),
    "bfloat16": torch.tensor(0.5, dtype=torch.bfloat16),
    "numpy": np.float32(0.5),
    "numpy array": np.array(0.5),
    "decimal": decimal.Decimal("0.5"),
    "fraction": fractions.Fraction(1, 2),
}


class _Factor:
    micro_batches = most = 1
    lr_factor = 2.0

    def looks_at(self, step):
        return False

    def decide(self, step, noise):
        return 1

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def _train(rate, *, groups=1, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    parts = model if groups == 2 else [model]
    optimizer = OwnRate([{"params": list(part.parameters())} for part in parts], rate)
    with gradwatch.watch(model, optimizer, **options) as watcher:
        for _ in range(5):
            model(torch.ones(2, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert optimizer.param_groups[0]["lr"] is rate
    return watcher


@pytest.mark.parametrize("options", [{}, {"clip": 0.1}, {"on_nonfinite": "skip"}], ids=str)
@pytest.mark.parametrize("groups", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("name", [*NO_NUMBER, *NUMBER])
def test_watching_goes_on(name, groups, options, tmp_path):
    """Steps, groups, report and run folder; a number of any library is recorded as that number."""
    rate = {**NO_NUMBER, **NUMBER}[name]
    watcher = _train(rate, groups=groups, run_dir=tmp_path / "run", **options)
    expected = 0.5 if name in NUMBER else math.nan
    for history in (watcher.history, gradwatch.load(tmp_path / "run")):
        assert history.steps()["lr"].tolist() == pytest.approx([expected] * 5, nan_ok=True)
        assert str(history.report())
        rates = history.groups()["lr"].tolist()
        assert rates == pytest.approx([expected] * (5 * groups), nan_ok=True)


@pytest.mark.parametrize("name", ["None", "text", "function", "tuple"])
def test_a_rate_that_cannot_be_multiplied_is_told(name):
    """A policy with a factor for the rate says once that it has no effect there."""
    with pytest.warns(gradwatch.GradwatchWarning, match="which is not a number: it stays as it is"):
        watcher = _train(NO_NUMBER[name], accumulate=_Factor())
    assert [event.kind for event in watcher.events] == ["mistake"]
    assert len(watcher.history.steps()) == 5


def test_a_loss_that_is_no_number():
    """A closure may return anything; the loss is NaN then."""
    for loss in (torch.tensor(1j), "loss", None, torch.ones(2)):
        weight = nn.Parameter(torch.ones(2))
        optimizer = torch.optim.SGD([weight], lr=0.1)

        def closure(weight=weight, loss=loss):
            weight.sum().backward()
            return loss

        with gradwatch.watch({"w": weight}, optimizer) as watcher:
            optimizer.step(closure)
        assert math.isnan(watcher.last.loss)

"""Skipping a step equals leaving its batch out, bit for bit: every optimizer of torch, however run."""

import copy
import math

import pytest
import torch
from torch import nn

import gradwatch

STEPS = 5
PLAIN = ["ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Muon", "NAdam"]
PLAIN += ["RAdam", "RMSprop", "Rprop", "SGD"]
FUSED = ["Adagrad", "Adam", "AdamW", "SGD"]
MORE = {"SGD": {"momentum": 0.9, "nesterov": True}, "RMSprop": {"momentum": 0.5}}


class SignSGD(torch.optim.Optimizer):
    """A third party's optimizer that follows the protocol and knows nothing of AMP."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        """Moves every weight by the learning rate, and counts."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["step"] = state.get("step", 0) + 1
                    parameter.add_(parameter.grad.sign(), alpha=-group["lr"])


def _optimizer(name, parameters, **options):
    kind = SignSGD if name == "SignSGD" else getattr(torch.optim, name)
    return kind(parameters, lr=0.01, **MORE.get(name, {}), **options)


def _train(place, name, steps, options, *, scaled, watched, poisoned=None):
    """Trains on the batches of some steps; the loss of one of them may be NaN."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False))
    place.to(model)
    optimizer = _optimizer(name, model.parameters(), **options)
    scaler = torch.amp.GradScaler(place.type, init_scale=64.0, enabled=scaled)
    watch = gradwatch.watch(
        model, optimizer, scaler=scaler if scaled else None, on_nonfinite="skip", **watched
    )
    with place.late(), watch as watcher:
        for step in steps:
            torch.empty(1000).fill_(math.nan)  # what uninitialised memory may then hold
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            loss = model(place.tensor(x)).square().mean() * (math.nan if step == poisoned else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    state = copy.deepcopy(optimizer.state_dict())
    return [p.detach().clone() for p in model.parameters()], state, watcher


def _assert_same(one, other, where=""):
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            _assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for position, (left, right) in enumerate(zip(one, other, strict=True)):
            _assert_same(left, right, f"{where}[{position}]")
    else:
        assert one == other, where


@pytest.mark.parametrize("poisoned", [0, 2], ids=["first step", "third step"])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "GradScaler"])
@pytest.mark.parametrize("watched", [{}, {"clip": 0.1}], ids=["", "clip"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in (*PLAIN, "SignSGD")),
        *((name, {"foreach": True}) for name in ("Adam", "SGD")),
        *((name, {"fused": True}) for name in FUSED),
    ],
    ids=str,
)
def test_a_skip_equals_a_batch_left_out(name, options, watched, place, scaled, poisoned):
    """Weights and optimizer state, the first step included, with and without a GradScaler."""
    if not hasattr(torch.optim, name) and name != "SignSGD":
        pytest.skip(f"needs a torch that has torch.optim.{name}")
    steps = range(STEPS)
    how = {"scaled": scaled, "watched": watched}
    weights, state, watcher = _train(place, name, steps, options, poisoned=poisoned, **how)
    without = [step for step in steps if step != poisoned]
    expected, expected_state, _ = _train(place, name, without, options, **how)
    _assert_same(weights, expected)
    _assert_same(state, expected_state)
    outcomes = list(watcher.history.steps()["outcome"])
    assert [outcome != "applied" for outcome in outcomes] == [step == poisoned for step in steps]


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=str)
def test_ten_skips_in_a_row_are_enough(options, place):
    """The next one raises with the whole story; a good step in between starts the count anew."""
    weight = nn.Parameter(place.tensor(torch.ones(3)))
    optimizer = torch.optim.AdamW([weight], **options)
    taken = 0

    def train():
        nonlocal taken
        for step in range(40):
            (weight * (1.0 if step in (0, 6) else math.nan)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            taken += 1

    with (
        place.late(),
        gradwatch.watch({"w": weight}, optimizer, on_nonfinite="skip") as watcher,
        pytest.raises(gradwatch.NonFiniteGradientError) as error,
    ):
        train()
    assert taken == 17  # 6 skips, a good one, 10 skips
    assert "10 steps in a row" in str(error.value)
    assert "max_consecutive_skips" in str(error.value)
    assert torch.isfinite(weight).all()
    assert watcher.history.steps()["outcome"].iloc[7:17].tolist() == ["skipped_nonfinite"] * 10


def test_the_count_of_skips_survives_a_checkpoint():
    """A run that is restored in the middle of a bad stretch does not start counting anew."""

    def train(skips, state=None):
        weight = nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([weight])
        watcher = gradwatch.watch(
            {"w": weight}, optimizer, on_nonfinite="skip", max_consecutive_skips=3
        )
        if state is not None:
            watcher.load_state_dict(state)
        with watcher:
            for _ in range(skips):
                (weight * math.nan).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        return watcher.state_dict()

    state = train(2)
    train(1, state)
    with pytest.raises(gradwatch.NonFiniteGradientError, match="3 steps in a row"):
        train(2, state)

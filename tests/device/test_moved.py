"""A model that is moved while it is watched: records, clips and skips are those of a fit in one place."""

import math

import pytest
import torch
from torch import nn

import gradwatch
from tests.support import device

CPU = torch.device("cpu")
STEPS, MOVE_AT, BAD = 9, 5, 7
TWO = pytest.mark.skipif(len(device.DEVICES) < 2, reason="needs two devices")

# Watchers of each kind, made anew for each run; a policy has a memory.
KINDS = {
    "watch": dict,
    "norm": lambda: {"clip": 0.3},
    "infinity norm": lambda: {"clip": gradwatch.ClipByNorm(0.1, norm_type=math.inf)},
    "value": lambda: {"clip": gradwatch.ClipByValue(0.05)},
    "auto": lambda: {"clip": "auto"},
    "autoclip": lambda: {"clip": gradwatch.AutoClip(percentile=50)},
    "zclip": lambda: {"clip": gradwatch.ZClip(warmup_steps=3)},
    "adagc": lambda: {"clip": gradwatch.AdaGC(warmup=3)},
    "adaptive": lambda: {"clip": gradwatch.AdaptiveGradientClip(0.01)},
    "statistics": lambda: {
        "statistics": ("norm", "max", "mean", "std", "zeros", "weight_norm", "update_ratio")
    },
    "skip": lambda: {"on_nonfinite": "skip"},
    "spikes": lambda: {"skip_spikes": 4.0},
    "clip and skip": lambda: {"clip": 0.3, "on_nonfinite": "skip", "skip_spikes": 6.0},
}
COLUMNS = ["grad_norm", "grad_norm_clipped", "clip_coef", "outcome", "micro_batches", "weight"]


class Centered(nn.Module):
    """Subtracts a running mean, which is a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean(0) * 0.1)
        return x - self.mean


def make():
    """Makes a model with a buffer."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), Centered(), nn.Tanh(), nn.Linear(8, 1))


def batches(poisoned):
    """Makes the inputs; those of one step are NaN where ``poisoned``."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2 * STEPS, 16, 4, generator=generator)
    if poisoned:
        x[2 * BAD] = math.nan
    return x


def plain_steps(model, optimizer, steps, x):
    """Trains with one micro-batch a step, where the model is."""
    where = next(model.parameters()).device
    for step in steps:
        optimizer.zero_grad()
        model(x[step].to(where)).square().mean().backward()
        optimizer.step()


def sgd(model):
    """Makes an optimizer without a state, which a move would have to take along."""
    return torch.optim.SGD(model.parameters(), lr=0.05)


def train(options, moves=None, *, managed=False, fused=False, poisoned=False, middle=False):
    """Trains nine steps of two micro-batches, and moves the model before the fifth."""
    model, x = make(), batches(poisoned)
    first, second = moves or (CPU, CPU)
    model.to(first)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=fused)
    if managed:
        options = {**options, "accumulate": 2}
    where = first
    with gradwatch.watch(model, optimizer, **options) as watcher:
        for step in range(STEPS):
            for number in range(2):
                if moves and step == MOVE_AT and number == middle:
                    model.to(second)
                    where = second
                loss = model(x[2 * step + number].to(where)).square().mean()
                if managed:
                    watcher.backward(loss)
                else:
                    (loss / 2).backward()
            if managed:
                watcher.step()
            else:
                optimizer.step()
                optimizer.zero_grad()
    return watcher, {name: one.detach().cpu() for name, one in model.state_dict().items()}


def assert_same(moved, still):
    """Compares records, statistics and events of two watchers, to six digits."""
    new, old = moved.history.steps()[COLUMNS], still.history.steps()[COLUMNS]
    assert new.outcome.tolist() == old.outcome.tolist()
    for column in set(COLUMNS) - {"outcome"}:
        expected = old[column].tolist()
        assert new[column].tolist() == pytest.approx(expected, rel=2e-5, nan_ok=True), column
    new, old = moved.history.parameters(), still.history.parameters()
    assert new.shape == old.shape
    for column in old.select_dtypes("number"):
        expected = old[column].tolist()
        assert new[column].tolist() == pytest.approx(expected, rel=2e-5, abs=1e-9, nan_ok=True)
    assert _told(moved) == _told(still)


def _told(watcher):
    """Returns the events by step: that buffers are poisoned may be known a few steps later."""
    told = [(one.kind, one.step, one.parameter) for one in watcher.events]
    return sorted(told, key=lambda one: one[1])


@TWO
@pytest.mark.parametrize("managed", [False, True], ids=["plain", "managed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_move_to_another_device_changes_nothing(kind, managed):
    """The parameters stay, and what is remembered of them goes along: policies, statistics, skips."""
    poisoned = "skip" in kind or kind == "spikes"
    still, expected = train(KINDS[kind](), managed=managed, poisoned=poisoned)
    moved, weights = train(KINDS[kind](), device.DEVICES, managed=managed, poisoned=poisoned)
    assert_same(moved, still)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6, equal_nan=True)


@TWO
@pytest.mark.parametrize("managed", [False, True], ids=["plain", "managed"])
@pytest.mark.parametrize("kind", ["watch", "norm", "auto", "statistics", "clip and skip"])
def test_a_move_between_two_micro_batches(kind, managed):
    """The gradients go along, and the step is that of both."""
    poisoned = "skip" in kind
    still, _ = train(KINDS[kind](), managed=managed, poisoned=poisoned)
    moved, _ = train(KINDS[kind](), device.DEVICES, managed=managed, poisoned=poisoned, middle=True)
    assert_same(moved, still)


@TWO
@pytest.mark.parametrize("kind", ["norm", "auto", "skip", "clip and skip"])
def test_a_fused_optimizer_that_is_moved(kind):
    """The flags and factors of its kernel are on the device of the parameters."""
    poisoned = "skip" in kind
    still, expected = train(KINDS[kind](), fused=True, poisoned=poisoned)
    moved, weights = train(KINDS[kind](), device.DEVICES, fused=True, poisoned=poisoned)
    assert_same(moved, still)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("entered", [False, True], ids=["before attach", "after attach"])
@pytest.mark.parametrize("kind", KINDS)
def test_to_the_device_after_watch(kind, entered):
    """Whether the move keeps the parameters or replaces them, each step is that of the CPU."""
    x = batches("skip" in kind or kind == "spikes")
    model = make()
    with gradwatch.watch(model, **KINDS[kind]()) as still:
        plain_steps(model, sgd(model), range(STEPS), x)
    model = make()
    moved = gradwatch.watch(model, **KINDS[kind]())
    if not entered:
        device.to(model)
    with moved:
        if entered:
            device.to(model)
        plain_steps(model, sgd(model), range(STEPS), x)
    assert_same(moved, still)


@pytest.mark.parametrize("kind", KINDS)
def test_to_the_device_in_the_middle(kind):
    """With a new optimizer after the move every norm, clip and skip is that of the CPU."""
    x = batches("skip" in kind or kind == "spikes")
    watchers = []
    for moves in (False, True):
        model = make()
        optimizer = sgd(model)
        with gradwatch.watch(model, **KINDS[kind]()) as watcher:
            plain_steps(model, optimizer, range(MOVE_AT), x)
            if moves:
                device.to(model)
            optimizer = sgd(model)
            plain_steps(model, optimizer, range(MOVE_AT, STEPS), x)
        watchers.append(watcher)
    still, moved = (one.history.steps() for one in watchers)
    assert moved.outcome.tolist() == still.outcome.tolist()
    for column in ("grad_norm", "grad_norm_clipped", "clip_coef"):
        expected = still[column].tolist()
        assert moved[column].tolist() == pytest.approx(expected, rel=2e-5, nan_ok=True), column


def test_an_optimizer_that_holds_what_was_left_on_the_cpu():
    """Where a move replaces the parameters, the optimizer that was built before trains nothing."""
    model = make()
    optimizer, then = sgd(model), model[0].weight
    with gradwatch.watch(model, optimizer, clip=0.3) as watcher:
        device.to(model)
        plain_steps(model, optimizer, range(3), batches(poisoned=False))
    told = [event.message for event in watcher.events if event.kind == "mistake"]
    if model[0].weight is then:
        assert told == []
    else:
        assert told[0].startswith("SGD steps the old 4 parameters (0.weight, 0.bias, 3.weight, ")

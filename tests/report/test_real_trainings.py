"""Real trainings under gradwatch: sick ones are found, healthy ones are silent."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradwatch

STEPS = 60


def _mlp(depth=3, width=32, activation=nn.ReLU):
    layers = [nn.Linear(16, width), activation()]
    for _ in range(depth - 2):
        layers += [nn.Linear(width, width), activation()]
    return nn.Sequential(*layers, nn.Linear(width, 4))


def _train(model, optimizer, zero_grad=True, spoil=None, scale=1.0, dtype=torch.float32):
    centres = torch.randn(4, 16)
    options = {"statistics": ("update_ratio", "zeros"), "every": 5}
    with gradwatch.watch(model, optimizer, **options) as watcher:
        for step in range(1, STEPS + 1):
            labels = torch.randint(0, 4, (32,))
            points = centres[labels] + torch.randn(32, 16)
            if step == spoil:
                points = points * torch.nan
            (scale * F.cross_entropy(model(points.to(dtype)).float(), labels)).backward()
            optimizer.step()
            if zero_grad:
                optimizer.zero_grad()
    return watcher.history.report()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(5)


@pytest.mark.parametrize(
    ("kind", "rate"), [(torch.optim.SGD, 0.05), (torch.optim.Adam, 1e-3), (torch.optim.AdamW, 3e-3)]
)
def test_healthy_training_is_silent(kind, rate):
    """With three optimizers."""
    model = _mlp()
    assert _train(model, kind(model.parameters(), lr=rate)).kinds == ()


def test_frozen_layer_is_silent():
    """It is not meant to receive a gradient."""
    model = _mlp()
    model[0].requires_grad_(False)
    assert _train(model, torch.optim.Adam(model.parameters(), lr=1e-3)).kinds == ()


def test_rate_a_hundred_times_too_high():
    """The norms explode, and the NaN that follows is put down to that."""
    model = _mlp()
    report = _train(model, torch.optim.SGD(model.parameters(), lr=5.0, momentum=0.9))
    assert report.kinds[0] in ("nan", "exploding")
    assert "exploding" in report.kinds


def test_rate_a_hundred_times_too_high_with_adam():
    """Its norms come down again; what happened at the start is told."""
    model = _mlp(4)
    report = _train(model, torch.optim.Adam(model.parameters(), lr=0.2))
    assert {"unstable_start", "update_large"} <= set(report.kinds)


def test_sigmoid_stack():
    """Thirty deep, its gradients vanish; the first layers are named."""
    model = _mlp(30, activation=nn.Sigmoid)
    report = _train(model, torch.optim.Adam(model.parameters(), lr=1e-3))
    assert report.kinds[0] == "vanishing"
    assert report.findings[0].seen.parameters[0] == "0.weight"


def test_dead_relu():
    """All parameters up to the dead layer are named, none after it."""
    model = _mlp(4)
    nn.init.constant_(model[2].bias, -50.0)
    (finding, *_) = _train(model, torch.optim.Adam(model.parameters(), lr=1e-3))
    assert finding.kind == "zero_gradient"
    assert set(finding.seen.parameters) == {"0.weight", "0.bias", "2.weight", "2.bias", "4.weight"}


def test_detached_branch():
    """Its parameters are named."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.side = _mlp(), _mlp()

        def forward(self, x):
            return self.main(x) + self.side(x).detach()

    model = Two()
    (finding,) = _train(model, torch.optim.Adam(model.parameters(), lr=1e-3))
    assert finding.kind == "no_gradient"
    assert all(name.startswith("side.") for name in finding.seen.parameters)


@pytest.mark.parametrize(("kind", "rate"), [(torch.optim.SGD, 0.05), (torch.optim.Adam, 1e-3)])
def test_forgotten_zero_grad(kind, rate):
    """Comes first, whatever follows from it."""
    model = _mlp()
    report = _train(model, kind(model.parameters(), lr=rate), zero_grad=False)
    assert report.kinds[0] == "accumulating"


def test_one_nan_batch():
    """The step is named, and a single bad batch is blamed."""
    model = _mlp()
    report = _train(model, torch.optim.Adam(model.parameters(), lr=1e-3), spoil=40)
    assert report.kinds == ("nan",)
    assert report.findings[0].seen.steps[0] == 40
    assert "single bad batch" in report.findings[0].advice


def test_float16_weights_without_a_scaler():
    """Gradients at the lower end of float16 are told, though no dtype is recorded."""
    model = _mlp(4).half()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    report = _train(model, optimizer, scale=1e-4, dtype=torch.float16)
    assert report.kinds[0] == "half_precision"


def test_rates_are_those_of_the_groups():
    """A group at 300 times the rate of the first is named with its own rate, and first."""
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    groups = [
        {"params": model[0].parameters(), "lr": 1e-3},
        {"params": model[2].parameters(), "lr": 0.3, "name": "head"},
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    watch = gradwatch.watch(model, optimizer, statistics=("update_ratio",), exploding_norm=1.0)
    with watch as watcher:
        for _ in range(30):
            inputs = torch.randn(16, 8) * 4
            (model(inputs) - inputs.sum(1, keepdim=True)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    advice = {finding.kind: finding.advice for finding in watcher.report()}
    assert "(0.3 in parameter group 'head', 0.001 in 0)" in advice["exploding"]
    assert "(0.3 in parameter group 'head', 0.001 in 0)" in advice["unstable_start"]
    assert "(0.3 in parameter group 'head' of SGD)" in advice["update_large"]

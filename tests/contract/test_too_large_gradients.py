"""Steps whose gradients are finite and too large: which parameters, which examples."""

import copy
import math

import pytest
import torch
from torch import nn

import gradwatch
from tests.support import zoo
from tests.support.state import differences, state_of

STEPS = 40
CULPRIT = 5


def _train(explain, accumulate=1, model=None, **options):
    """Train on noise; the last step has one example with a wrong target."""
    torch.manual_seed(3)
    model = zoo.small() if model is None else model
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    options = {"skip_spikes": "auto", "explain": explain, **options}
    with gradwatch.watch(model, optimizer, **options) as watcher:
        for step in range(STEPS):
            for micro_batch in range(accumulate):
                x = torch.randn(16, 4)
                target = x.sum(1, keepdim=True)
                if step == STEPS - 1 and micro_batch == accumulate - 1:
                    target[CULPRIT] = 1e4
                (model(x) - target).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return watcher, state_of(model, optimizer)


def test_a_spike_names_parameters_and_examples():
    """A step that skip_spikes leaves out names the example that made it, and three parameters."""
    watcher, _ = _train(explain=True)
    (found,) = watcher.explanations
    assert (found.kind, found.step, found.micro_batch) == ("spike", STEPS, 1)
    assert found.largest_examples[0].name == str(CULPRIT)
    assert found.largest_examples[0].share > 0.99
    assert len(found.largest_examples) == len(found.largest_parameters) == 3
    norms = watcher.history.parameters().query("step == @STEPS").set_index("parameter")["grad_norm"]
    total = watcher.history.steps()["grad_norm"].iloc[-1]
    for one in found.largest_parameters:
        assert one.norm == pytest.approx(norms[one.name], rel=1e-6)
        assert one.share == pytest.approx((norms[one.name] / total) ** 2, rel=1e-5)
    assert found.largest_examples[0].norm == pytest.approx(total, rel=0.01)


def test_a_spike_of_several_micro_batches():
    """The examples are those of the micro-batch that made the spike."""
    watcher, _ = _train(explain=True, accumulate=3)
    (found,) = watcher.explanations
    assert found.micro_batch == 3
    assert found.largest_examples[0].name == str(CULPRIT)
    assert "Micro-batch 3 of 3 has 100% of the gradient" in found.notes[0]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_training_with_it_is_the_same(accumulate):
    """Weights, state and random numbers are those of a training that only skips."""
    model = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1)
    )
    ends = []
    for explain in (False, True):
        watcher, state = _train(explain, accumulate, copy.deepcopy(model))
        assert len(watcher.explanations) == explain
        ends.append(state)
    assert list(differences(*ends)) == []


@pytest.mark.parametrize("clip", [None, 1.0])
def test_an_overflow_names_parameters_and_examples(clip):
    """Finite gradients whose norm is beyond float32 are split like others, in float64."""
    model = zoo.small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gradwatch.watch(model, optimizer, on_nonfinite="explain", clip=clip) as watcher:
        x, target = torch.randn(16, 4), torch.zeros(16, 1)
        target[CULPRIT] = 1e12
        (1e12 * (model(x) - target).mean(1) * target[:, 0]).mean().backward()
        optimizer.step()
    (found,) = watcher.explanations
    assert found.kind == "overflow"
    assert found.largest_examples[0].name == str(CULPRIT)
    assert found.largest_examples[0].share == pytest.approx(1.0)
    assert len(found.largest_parameters) == 3
    shares = [one.share for one in found.largest_parameters]
    assert shares == sorted(shares, reverse=True)
    assert all(math.isfinite(one.norm) for one in found.largest_parameters)


class Divided(nn.Module):
    """A layer whose result is divided by almost nothing."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x):
        return self.layer(x) / 1e-25


def test_an_overflow_names_the_line():
    """The operation from which the elements are so large is named, and it is in the text."""
    model = Divided()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gradwatch.watch(model, optimizer, on_nonfinite="explain") as watcher:
        model(torch.randn(16, 4)).mean().backward()
        optimizer.step()
    (found,) = watcher.explanations
    assert (found.kind, found.origin, found.operation) == ("overflow", "operation", "div")
    assert (found.module, found.source) == ("", "return self.layer(x) / 1e-25")
    assert len(found.largest_parameters) == 2
    assert len(found.largest_examples) == 3
    assert found.source in str(found)
    assert "overflow" in str(found).lower()


def test_an_overflow_that_the_loop_has_clipped():
    """A loop's own clip makes zeros of such gradients; the micro-batch is found all the same."""
    torch.manual_seed(0)
    model = zoo.small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gradwatch.watch(model, optimizer, on_nonfinite="explain") as watcher:
        for factor in (1.0, 1e25, 1.0):
            (model(torch.randn(16, 4)).mean() * factor).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    (found,) = watcher.explanations
    assert (found.kind, found.micro_batch, found.origin) == ("overflow", 2, "output_gradient")
    assert len(found.largest_parameters) == len(found.largest_examples) == 3


def test_units_under_a_scaler():
    """With a GradScaler norms are in true units."""
    model = zoo.small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    torch.manual_seed(3)
    options = {"skip_spikes": "auto", "explain": True, "scaler": scaler}
    with gradwatch.watch(model, optimizer, **options) as watcher:
        for step in range(STEPS):
            x = torch.randn(16, 4)
            target = x.sum(1, keepdim=True)
            if step == STEPS - 1:
                target[CULPRIT] = 1e4
            scaler.scale((model(x) - target).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    (found,) = watcher.explanations
    assert found.largest_examples[0].name == str(CULPRIT)
    total = watcher.history.steps()["grad_norm"].iloc[-1]
    assert found.largest_examples[0].norm == pytest.approx(total, rel=0.01)
    first = found.largest_parameters[0]
    assert first.norm == pytest.approx(total * math.sqrt(first.share), rel=1e-5)


def test_the_norm_of_another_clip():
    """Where the watcher measures another norm, shares are those of the L2 norm all the same."""
    watcher, _ = _train(explain=True, clip=gradwatch.ClipByNorm(1e9, norm_type=math.inf))
    plain, _ = _train(explain=True)
    (found,), (expected,) = watcher.explanations, plain.explanations
    names = [one.name for one in expected.largest_parameters]
    assert [one.name for one in found.largest_parameters] == names
    for one, other in zip(found.largest_parameters, expected.largest_parameters, strict=True):
        assert one.share == pytest.approx(other.share, rel=1e-5)
        assert one.norm == pytest.approx(other.norm, rel=1e-5)

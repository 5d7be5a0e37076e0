"""A fused optimizer scales and skips by itself, and its attributes are as before afterwards."""

import copy

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.hooks.optimizer import FusedStep
from tests.support import zoo

FUSED = [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad]


@pytest.mark.parametrize("kind", FUSED)
def test_the_fused_ones_listen(kind, machine):
    """A trial finds that they scale and skip; the optimizer itself is not touched by it."""
    optimizer = kind(machine.to(zoo.small()).parameters(), lr=0.1, fused=True)
    state = copy.deepcopy(optimizer.state_dict())
    assert FusedStep(optimizer).can_scale
    assert str(optimizer.state_dict()) == str(state)


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.AdamW,
        lambda p: torch.optim.AdamW(p, foreach=True),
        torch.optim.RMSprop,
        lambda p: torch.optim.SGD(p, lr=0.1),
    ],
)
def test_others_are_not_taken_for_one(make):
    """They would pass over the attributes in silence, or fail."""
    assert not FusedStep(make(zoo.small().parameters())).can_scale


def test_a_state_can_make_it_an_unfused_one():
    """What load_state_dict brings is looked at in each step."""
    optimizer = torch.optim.AdamW(zoo.small().parameters(), fused=True)
    fused = FusedStep(optimizer)
    optimizer.load_state_dict(torch.optim.AdamW(zoo.small().parameters()).state_dict())
    assert not fused.can_scale


def test_a_momentum_buffer_must_be_there_before_a_skip(machine):
    """Fused SGD leaves it uninitialised where its first step is skipped."""
    model = machine.to(zoo.small())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    fused = FusedStep(optimizer)
    model(machine.tensor(torch.ones(2, 4))).sum().backward()
    assert not fused.can_skip
    optimizer.step()
    assert fused.can_skip


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", FUSED)
def test_a_clip_makes_no_pass_and_leaves_no_trace(kind, scaled, machine):
    """The weights are those of a clip in place, and no attribute stays on the optimizer."""

    def train(watched):
        model = machine.to(zoo.small())
        optimizer = kind(model.parameters(), lr=0.1, fused=True)
        scaler = torch.amp.GradScaler(machine.type, init_scale=64.0, enabled=scaled)
        options = {"clip": 0.05, "scaler": scaler} if watched else {}
        with gradwatch.watch(model, optimizer, **options) as watcher:
            for step in range(4):
                x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
                scaler.scale(model(machine.tensor(x)).square().mean()).backward()
                if not watched:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), 0.05)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        assert not hasattr(optimizer, "grad_scale")
        assert not hasattr(optimizer, "found_inf")
        return list(model.parameters()), watcher.history.steps()

    weights, steps = train(True)
    expected, _ = train(False)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-7)
    assert steps["clipped"].all()
    assert (steps["grad_norm_clipped"] - 0.05).abs().max() < 1e-6


def test_an_attribute_of_the_users_own_stays(place):
    """A grad_scale that the loop has set is multiplied for the step, and is there afterwards."""
    model = place.to(zoo.small())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    own = place.tensor(torch.tensor(2.0))
    optimizer.grad_scale = own
    before = [p.detach().clone() for p in model.parameters()]
    with place.late(), gradwatch.watch(model, optimizer, clip=0.5):
        model(place.tensor(torch.ones(2, 4))).sum().backward()
        optimizer.step()
    moved = torch.stack([(p - b).norm() for p, b in zip(model.parameters(), before, strict=True)])
    assert moved.norm().item() == pytest.approx(0.5, rel=1e-5)
    assert optimizer.grad_scale is own

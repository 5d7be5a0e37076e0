"""Optimizers that step inside the backward: measured before the gradients are gone, never clipped."""

import copy
import warnings

import pytest
import torch

import gradwatch
from tests.support import float64, zoo

STEPS = 3


def _by_torch(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own import of torch.jit
        from torch.distributed.optim import _apply_optimizer_in_backward

    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})


def _by_optimizers(model):
    for parameter in model.parameters():
        optimizer = torch.optim.SGD([parameter], lr=0.1)

        def step(_, optimizer=optimizer):
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(step)


def _by_hand(model):
    def step(parameter):
        with torch.no_grad():
            parameter -= 0.1 * parameter.grad
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)


WAYS = [_by_torch, _by_optimizers, _by_hand]


def _loss(model, step):
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
    return model(x).square().mean()


def _train(model):
    for step in range(STEPS):
        _loss(model, step).backward()


def _expected():
    """The norm of every gradient, by a loop that steps after the backward."""
    model, norms = zoo.small(), {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        _loss(model, step).backward()
        seen = float64.gradient_norms(dict(model.named_parameters()))
        norms.update({(step + 1, name): norm for name, norm in seen.items()})
        optimizer.step()
        optimizer.zero_grad()
    return norms


def _recorded(watcher):
    frame = watcher.history.parameters()
    return frame.set_index(["step", "parameter"])["grad_norm"].to_dict()


@pytest.mark.parametrize("install", WAYS)
def test_gradients_are_measured_before_they_are_freed(install):
    """Every parameter of every step, and the training is the same as unwatched."""
    model = zoo.small()
    install(model)
    unwatched = copy.deepcopy(zoo.small())
    install(unwatched)
    with gradwatch.watch(model) as watcher:
        _train(model)
    _train(unwatched)
    assert _recorded(watcher) == pytest.approx(_expected(), rel=1e-6)
    for one, other in zip(model.parameters(), unwatched.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("install", WAYS)
def test_hooks_that_come_after_the_watcher(install):
    """Where the user's hooks are hung later, the first backward may be missed, no other."""
    model = zoo.small()
    with gradwatch.watch(model) as watcher:
        install(model)
        _train(model)
    recorded = list(_recorded(watcher).values())
    expected = list(_expected().values())
    assert sorted(recorded) == pytest.approx(sorted(expected[-len(recorded) :]), rel=1e-6)
    assert len(recorded) >= len(expected) * (STEPS - 1) / STEPS


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"clip": 1.0}, "Clipping by the global norm"),
        ({"on_nonfinite": "skip"}, 'on_nonfinite="skip"'),
        ({"on_nonfinite": "raise"}, 'on_nonfinite="raise"'),
        ({"accumulate": 2}, "accumulate=2"),
    ],
)
@pytest.mark.parametrize("install", [_by_torch, _by_optimizers])
def test_what_needs_all_gradients_is_refused(install, options, said):
    """It cannot be had there; the error says so before any weight changes."""
    model = zoo.small()
    install(model)
    watcher = gradwatch.watch(model, **options)
    with pytest.raises(ValueError, match="inside the backward") as error, watcher:
        _train(model)
    assert said in str(error.value)
    for one, other in zip(model.parameters(), zoo.small().parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_value_clip_works_inside_the_backward():
    """It limits each element by itself, whatever the others are."""
    model = zoo.small()
    _by_optimizers(model)
    with gradwatch.watch(model, clip=gradwatch.ClipByValue(1e-3)):
        _loss(model, 0).backward()
    for one, other in zip(model.parameters(), zoo.small().parameters(), strict=True):
        assert (one - other).abs().max() <= 0.1 * 1e-3 * (1 + 1e-3)

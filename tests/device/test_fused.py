"""A fused optimizer is tried out without a wait, and one that obeys nothing is found out."""

import contextlib
import sys

import pytest
import torch

import gradwatch
from tests.support import device, zoo


class _Quiet(torch.optim.SGD):
    """A class of the user's, which may do anything."""


def _waits(kind, watched, **options):
    model = device.to(zoo.small())
    optimizer = kind(model.parameters(), lr=0.1, fused=True)
    x = device.tensor(torch.ones(2, 4))
    with contextlib.ExitStack() as stack, device.counting() as counts:
        if watched:
            stack.enter_context(gradwatch.watch(model, optimizer, **options))
        for _ in range(3):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return counts.waits


@pytest.mark.parametrize("late", [0, 50])
@pytest.mark.parametrize("options", [{"clip": 0.05}, {"on_nonfinite": "skip"}])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_nothing_waits_from_watch_to_the_end(kind, options, late):
    """Also in watch() and in the first step, and however late the verdict of the trial comes."""
    with device.late(late):
        assert _waits(kind, True, **options) == _waits(kind, False)


def test_a_class_of_the_users_waits_once():
    """It is not trusted before its trial has been read."""
    assert _waits(_Quiet, True, clip=0.05) == _waits(_Quiet, False) + 1


def test_a_kernel_that_passes_over_both_is_found_out(monkeypatch):
    """As those of Apple's MPS did: told once the trial has arrived, and clipped in a pass from then on."""
    module = sys.modules["torch.optim.sgd"]  # torch.optim has no attribute of this name
    kernel = module._fused_sgd

    def deaf(*args, grad_scale, found_inf, **kwargs):
        kernel(*args, grad_scale=None, found_inf=None, **kwargs)

    monkeypatch.setattr(module, "_fused_sgd", deaf)
    model = device.to(zoo.small())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    x = device.tensor(torch.ones(2, 4))

    def train():
        with gradwatch.watch(model, optimizer, clip=0.05):
            for _ in range(4):
                before = [p.detach().clone() for p in model.parameters()]
                model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        return before

    with pytest.warns(gradwatch.GradwatchWarning, match="SGD passes over grad_scale"):
        before = train()
    pairs = zip(model.parameters(), before, strict=True)
    moved = torch.stack([(p.detach() - b).norm() for p, b in pairs]).norm()
    assert moved.item() == pytest.approx(0.05, rel=1e-4)

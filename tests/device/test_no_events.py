"""Devices that lack what numbers are sent with: they are waited for, and the numbers are right."""

import math

import pandas as pd
import pytest
import torch
from torch import nn

import gradwatch
from tests.support import device

pytestmark = pytest.mark.skipif(
    device.NAME not in ("fake", "mini"), reason="a real device has what it has"
)
MODULE = getattr(torch, device.DEVICE.type)


def _unknown(*args, **kwargs):
    raise RuntimeError("Expected isValidDeviceType(device_type) to be true")


def _no_event(monkeypatch):
    monkeypatch.delattr(MODULE, "Event")
    monkeypatch.setattr(torch, "Event", _unknown)


def _no_torch_event(monkeypatch):
    monkeypatch.delattr(MODULE, "Event")
    monkeypatch.delattr(torch, "Event")  # as before torch 2.5


def _event_cannot_be_recorded(monkeypatch):
    monkeypatch.setattr(MODULE.Event, "record", _unknown)


def _no_current_stream(monkeypatch):
    monkeypatch.delattr(MODULE, "current_stream")
    monkeypatch.setattr(torch.accelerator, "current_stream", _unknown)


def _no_pinned_memory(monkeypatch):
    empty_like = torch.empty_like

    def without(*args, pin_memory=False, **kwargs):
        if pin_memory:
            raise RuntimeError("Need to provide pin_memory allocator to use pin memory.")
        return empty_like(*args, **kwargs)

    monkeypatch.setattr(torch, "empty_like", without)


LACKING = [
    _no_event, _no_torch_event, _event_cannot_be_recorded, _no_current_stream, _no_pinned_memory,
]  # fmt: skip
OPTIONS = {
    "plain": {},
    "clip": {"clip": 0.05},
    "auto": {"clip": "auto"},
    "skip": {"on_nonfinite": "skip"},
    "statistics": {"statistics": ("max", "update_ratio")},
}


def _train(on_device, fused, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    model = device.to(model) if on_device else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    with gradwatch.watch(model, optimizer, **options) as watcher:
        for step in range(6):
            x = torch.randn(8, 4)
            if step == 3 and "on_nonfinite" in options:
                x[0, 0] = math.nan
            model(device.tensor(x) if on_device else x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return watcher.history


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("lacks", LACKING)
def test_the_numbers_are_those_of_the_cpu(lacks, options, fused, monkeypatch):
    """Watching goes on, and nothing of it reaches the loop."""
    expected = _train(False, fused, **options)
    lacks(monkeypatch)
    found = _train(True, fused, **options)
    columns = ["grad_norm", "grad_norm_clipped", "clip_coef", "clip_threshold", "outcome"]
    steps, others = found.steps()[columns], expected.steps()[columns]
    pd.testing.assert_frame_equal(steps, others, rtol=1e-5, atol=1e-9)
    assert found.events().kind.tolist() == expected.events().kind.tolist()


def test_a_look_at_buffers_waits_for_nothing():
    """Neither the bad step of a fused optimizer nor a later one waits for what its buffers hold."""
    model = device.to(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    waits = []
    with device.late(1), gradwatch.watch(model, optimizer, on_nonfinite="skip"):
        for step in range(6):
            x = torch.full((8, 4), math.nan) if step == 2 else torch.randn(8, 4)
            x = device.tensor(x)
            with device.counting() as counts:
                model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            waits.append(counts.waits)
    assert waits == [0] * 6

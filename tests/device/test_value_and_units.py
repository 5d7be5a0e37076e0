"""ClipByValue and AdaptiveGradientClip on a device: as on the CPU, and without a wait."""

import math

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.clip import apply
from tests.support import device

POLICIES = {
    "value": lambda: gradwatch.ClipByValue(0.01),
    "units": lambda: gradwatch.AdaptiveGradientClip(0.01),
}
STEPS, BAD = 6, 3


def _train(on_device, policy=None, scale=None, fused=True, bad=None, width=8):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))
    model = device.to(model) if on_device else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    kind = device.DEVICE.type if on_device else "cpu"
    scaler = torch.amp.GradScaler(kind, scale or 1.0, enabled=scale is not None)
    options = {"clip": policy, "scaler": scaler if scale else None}
    waits = []
    watcher = gradwatch.watch(model, optimizer, **options) if policy else None
    for step in range(STEPS):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        if step == bad:
            x[0, 0] = math.inf
        x = device.tensor(x) if on_device else x
        with device.counting() as counts:
            # Only one weight of the first layer sees it.
            loss = model[2](model[1](model[0](x))).square().mean() + 0.1 * model[0](x)[0, 0]
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        waits.append(counts.waits)
    if watcher is not None:
        watcher.close()
    return waits, [p.detach().cpu() for p in model.parameters()], watcher


COLUMNS = ["grad_norm", "grad_norm_clipped", "clip_coef", "clip_threshold", "outcome", "clipped"]


@pytest.mark.parametrize("bad", [None, BAD])
@pytest.mark.parametrize("scale", [None, 64.0, 3.0])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_it_is_clipped_as_on_the_cpu(policy, fused, scale, bad):
    """The same weights and records, also of a gradient that is not finite, which nothing clips."""
    _, found, watched = _train(True, policy(), scale, fused, bad)
    _, expected, on_cpu = _train(False, policy(), scale, fused, bad)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    steps, others = watched.history.steps(), on_cpu.history.steps()
    for name in COLUMNS[:4]:
        numbers = pytest.approx(others[name].tolist(), rel=1e-6, nan_ok=True)
        assert steps[name].tolist() == numbers, name
    for name in COLUMNS[4:]:
        assert steps[name].equals(others[name]), name


@pytest.mark.parametrize("late", [0, 3])
@pytest.mark.parametrize("bad", [None, BAD])
@pytest.mark.parametrize("scale", [None, 64.0])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_nothing_waits(policy, scale, bad, late):
    """Also where the loss scale, which only the device knows, is still in the gradients."""
    with device.late(late):
        assert (
            _train(True, policy(), scale, True, bad)[0] == _train(True, None, scale, True, bad)[0]
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_limit_on_the_device_is_that_of_a_number(dtype, monkeypatch):
    """Small gradients together, large ones each by itself; any shape, and NaN stays NaN."""
    monkeypatch.setattr(apply, "_SMALL", 10)
    torch.manual_seed(0)
    on_host = [torch.randn(shape).to(dtype) for shape in ((), (3,), (2, 4), (3, 5), (0,), (40,))]
    on_host[2][0, 1] = math.nan
    on_host[5][7] = math.inf
    for limit in (0.3, math.inf):
        found = [device.tensor(one) for one in on_host]
        apply.clamp_(found, torch.full((), limit, device=device.DEVICE))
        expected = [one.clone() for one in on_host]
        apply.clamp_(expected, limit)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.cpu().nan_to_num(7.0), other.nan_to_num(7.0))


def test_the_kernels_do_not_grow_with_the_parameters():
    """As many for three times the gradients."""

    def kernels(count):
        gradients = [device.tensor(torch.randn(3, 2)) for _ in range(count)]
        limit = device.tensor(torch.tensor(0.5))
        with device.counting() as counts:
            apply.clamp_(gradients, limit)
        return counts.kernels

    assert kernels(30) == kernels(10)

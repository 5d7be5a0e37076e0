"""A device without float64, and one that is the default: the numbers are those of the CPU."""

import math
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from torch import nn

import gradwatch
from tests.support import device

CPU = torch.device("cpu")
STATISTICS = ("norm", "max", "mean", "std", "zeros", "weight_norm", "update_ratio")
STEPS, SPIKE = 36, 30

KINDS = {
    "statistics": lambda: {"statistics": STATISTICS},
    "norm": lambda: {"clip": 0.3},
    "auto": lambda: {"clip": "auto"},
    "zclip": lambda: {"clip": gradwatch.ZClip(warmup_steps=5)},
    "zclip, slow": lambda: {"clip": gradwatch.ZClip(alpha=0.999, warmup_steps=5)},
    "autoclip": lambda: {"clip": gradwatch.AutoClip()},
    "adagc": lambda: {"clip": gradwatch.AdaGC(warmup=5)},
    "adaptive": lambda: {"clip": gradwatch.AdaptiveGradientClip(0.05)},
    "spikes": lambda: {"skip_spikes": "auto"},
    "managed": lambda: {"accumulate": 4, "clip": 0.5},
    "managed, weights": lambda: {"accumulate": 4},
    "curvature": lambda: {"curvature": None},
}


@contextmanager
def default_device():
    """Makes the device the default one."""
    torch.set_default_device(device.DEVICE)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def device_mode():
    """Puts the block into ``with device``."""
    with device.DEVICE:
        yield


AROUND = {"no float64": device.no_float64, "default": default_device, "mode": device_mode}
if device.NAME not in ("fake", "mini"):
    del AROUND["no float64"]


def make():
    """Makes a small model on the CPU."""
    with CPU:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))


def train(to, tensor, kind, optimizer="AdamW", micro_batches=1, state=None):
    """Trains; returns the history, the noise scale and the state of the watcher."""
    options, model = KINDS[kind]() if kind else {}, to(make())
    generator = torch.Generator().manual_seed(1)
    made = getattr(torch.optim, optimizer)(model.parameters(), lr=0.01)
    shape = (STEPS, 4, 8, 6)
    data = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    data[SPIKE] *= 20
    managed = "accumulate" in options
    if "curvature" in options:
        x = tensor(data[0, 0])
        options["curvature"] = gradwatch.CurvatureEvery(4, lambda one: (one(x) - 1).square().mean())
    with gradwatch.watch(model, made, **options) as watcher:
        if state is not None:
            watcher.load_state_dict(state)
        for batches in data:
            for i, batch in enumerate(batches[: 4 if managed else micro_batches]):
                x = tensor(batch)
                loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
                if managed:
                    here = torch.full((), float(i + 1), dtype=torch.float32, device="cpu")
                    watcher.backward(loss, weight=tensor(here) if "weights" in kind else None)
                    watcher.step()
                else:
                    (loss / micro_batches).backward()
            if not managed:
                made.step()
                made.zero_grad()
        return watcher.history, watcher.noise_scale, watcher.state_dict()


def assert_same(expected, got, rtol):
    """Compares two histories column by column."""
    for one, other in (
        (expected.steps(), got.steps()),
        (expected.parameters(), got.parameters()),
    ):
        assert list(one.columns) == list(other.columns)
        for name in set(one.columns) - {"time_s"}:
            a, b = one[name], other[name]
            if a.dtype.kind != "f":
                assert a.tolist() == b.tolist(), name
            else:  # differences of nearly equal numbers lose digits
                loose = 30 if name.startswith(("noise", "mean")) else 1
                np.testing.assert_allclose(b, a, rtol * loose, 1e-8, err_msg=name)


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_are_those_of_the_cpu(kind, around):
    """Policies, statistics, managed loops and curvature."""
    expected, noise, _ = train(lambda m: m, lambda x: x, kind)
    with AROUND[around]():
        got, other, _ = train(device.to, device.tensor, kind)
    assert_same(expected, got, 1e-5)
    assert (noise.updates, noise.reason) == (other.updates, other.reason)


@pytest.mark.parametrize("kind", ["auto", "managed", "statistics", "adagc", "curvature"])
def test_a_model_on_the_cpu_under_another_default_device(kind):
    """Nothing of a model on the CPU is looked for on the default device."""
    expected, _, _ = train(lambda m: m, lambda x: x, kind, optimizer="SGD")
    with default_device():
        got, _, _ = train(lambda m: m, lambda x: x, kind, optimizer="SGD")
    assert_same(expected, got, 0)


@pytest.mark.parametrize("around", [*AROUND, ""])
def test_a_loop_that_accumulates_has_its_noise_scale(around):
    """Only the norm of the first micro-batch is known there: the rest is no NaN of a device."""
    _, expected, _ = train(lambda m: m, lambda x: x, "", "SGD", micro_batches=4)
    with AROUND[around]() if around else nullcontext():
        _, got, _ = train(device.to, device.tensor, "", "SGD", micro_batches=4)
    assert got.updates == expected.updates == STEPS
    assert got.b_simple == pytest.approx(expected.b_simple, rel=1e-4)
    assert got.reason == expected.reason


@pytest.mark.skipif("no float64" not in AROUND, reason="needs a stand-in")
@pytest.mark.parametrize("kind", ["auto", "zclip", "autoclip", "adagc", "spikes"])
def test_a_checkpoint_moves_between_devices(kind):
    """The state of a run on the CPU goes on where there is no float64, and the other way round."""
    host, there = (lambda m: m, lambda x: x), (device.to, device.tensor)
    _, _, state = train(*host, kind)
    expected, _, _ = train(*host, kind, state=state)
    with device.no_float64():
        got, _, onward = train(*there, kind, state=state)
    assert_same(expected, got, 1e-5)
    back, _, _ = train(*host, kind, state=onward)
    again, _, _ = train(*host, kind, state=train(*host, kind, state=state)[2])
    assert_same(again, back, 1e-5)


@pytest.mark.parametrize("around", AROUND)
def test_gradients_are_checked(around):
    """In float64, or in float32 where that is all there is; a wrong gradient is found."""

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * ctx.saved_tensors[0]

    with AROUND[around]():
        x = device.tensor(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], device="cpu"))
        right = gradwatch.check_gradients(device.to(make()), (x,))
        wrong = gradwatch.check_gradients(Square.apply, x)
    # torch's own gradcheck writes through .data, which a wrapper's version counter sees.
    assert {one.kind for one in right.failures} <= {"contract"}
    assert right.precision == ("float32" if around == "no float64" else "float64")
    assert [one.kind for one in wrong.failures] == ["wrong"]


@pytest.mark.parametrize("around", AROUND)
def test_curvature_is_that_of_the_cpu(around):
    """Eigenvalues and trace."""

    def measured(to, tensor):
        x = tensor(torch.ones(3, 6, device="cpu"))
        return gradwatch.curvature(to(make()), lambda one: (one(x) - 1).square().mean())

    expected = measured(lambda m: m, lambda x: x)
    with AROUND[around]():
        got = measured(device.to, device.tensor)
    assert got.largest_eigenvalue == pytest.approx(expected.largest_eigenvalue, rel=1e-3)
    assert got.trace == pytest.approx(expected.trace, rel=1e-3)


@pytest.mark.parametrize("around", AROUND)
def test_a_nan_is_explained(around):
    """The example that it came with is named."""
    with AROUND[around]():
        data = torch.ones(8, 6, device="cpu")
        data[3, 2] = math.nan
        model, x = device.to(make()), device.tensor(data)
        found = gradwatch.explain(model, x, loss=lambda out: out.square().mean())
    assert "example 3" in str(found)


@pytest.mark.skipif("no float64" not in AROUND, reason="needs a stand-in")
def test_deviations_keep_their_digits():
    """The deviation of elements that hardly differ is not lost in their mean."""
    numbers = torch.linspace(0.999, 1.001, 1001, dtype=torch.float32, device="cpu")
    with device.no_float64():
        weight = nn.Parameter(device.tensor(torch.zeros(1001, device="cpu")))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        options = {"statistics": ("mean", "std", "weight_norm")}
        with gradwatch.watch({"w": weight}, optimizer, **options) as watcher:
            (weight * device.tensor(numbers)).sum().backward()
            optimizer.step()
    row = watcher.history.parameters().iloc[0]
    assert row["std"] == pytest.approx(float(numbers.to(torch.float64).std(correction=0)), rel=1e-5)
    assert row["mean"] == pytest.approx(1.0, rel=1e-6)

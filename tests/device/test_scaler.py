"""A GradScaler that was not passed is found on a device: records are as if it had been."""

import gc
import math
import threading
from contextlib import ExitStack

import pytest
import torch
from torch import nn

import gradwatch
from tests.support import device

STEPS = 6
OVERFLOWS = {"none": (), "the first": (0, 1, 2), "a later one": (3,), "the last": (STEPS - 1,)}
LOOPS = {"plain": (False, False), "unscaled": (True, False), "clipped": (True, True)}


def _model(seed=0):
    torch.manual_seed(seed)
    return device.to(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)))


def _optimizer(model, fused=False):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)


def _scaler(scale=1024.0):
    return torch.amp.GradScaler(device.DEVICE.type, init_scale=scale, growth_interval=4)


def _batch():
    return device.tensor(torch.randn(8, 4))


def _records(watcher):
    return watcher.history.steps().drop(columns="time_s"), watcher.history.parameters()


def _are_equal(some, others):
    for one, other in zip(some, others, strict=True):
        torch.testing.assert_close(
            one.select_dtypes("number").to_numpy(float, na_value=math.nan),
            other.select_dtypes("number").to_numpy(float, na_value=math.nan),
            equal_nan=True,
            rtol=1e-6,
            atol=0,
        )
    assert some[0]["outcome"].tolist() == others[0]["outcome"].tolist()


def _train(scaler, *, passed, named=True, overflows=(), loop="plain", parts=1, fused=False, **more):
    """Trains with the scaler in a list: no variable of the loop refers to it."""
    model = _model()
    optimizer = _optimizer(model, fused)
    unscales, clips = LOOPS[loop]
    options = {"scaler": scaler[0]} if passed else {}
    with gradwatch.watch(model, optimizer if named else None, **options, **more) as watcher:
        for step in range(STEPS):
            for _ in range(parts):
                loss = model(_batch()).square().mean() / parts
                scaler[0].scale(loss * (math.inf if step in overflows else 1.0)).backward()
            if unscales:
                scaler[0].unscale_(optimizer)
            if clips:
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            scaler[0].step(optimizer)
            scaler[0].update()
            optimizer.zero_grad()
    return _records(watcher)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("fused", [False, True])
def test_it_is_found(fused, overflow, loop):
    """All columns are those of a scaler that was passed: overflows, unscaling, clip and growth."""
    settings = {"fused": fused, "overflows": OVERFLOWS[overflow], "loop": loop}
    passed = _train([_scaler()], passed=True, **settings)
    _are_equal(_train([_scaler()], passed=False, **settings), passed)
    assert len(passed[0]) == STEPS
    assert passed[0]["loss_scale"].iloc[0] == 1024.0


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"named": False},
        {"parts": 2},
        {"on_nonfinite": "skip"},
        {"clip": 0.05},
        {"statistics": ["max"]},
    ],
    ids=str,
)
def test_it_is_found_with(options, fused):
    """So it is where the optimizer is not named, and with the options that look at a step."""
    settings = {"fused": fused, "overflows": (0, 3), **options}
    passed = _train([_scaler()], passed=True, **settings)
    _are_equal(_train([_scaler()], passed=False, **settings), passed)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_each_optimizer_has_its_own(named, fused):
    """Of two scalers in one model, each scales the records of the optimizer that it steps."""
    critic, generator = _model(1), _model(2)
    generator[2] = device.to(nn.Linear(8, 4))
    optimizers = [_optimizer(critic, fused), _optimizer(generator, fused)]
    scalers = [_scaler(2048.0), _scaler(512.0)]
    both = nn.ModuleList([critic, generator])
    with gradwatch.watch(both, optimizers if named else None) as watcher:
        for _ in range(3):
            x = _batch()
            for optimizer, scaler, loss in zip(
                optimizers,
                scalers,
                [
                    lambda x=x: (critic(generator(x).detach()) - critic(x)).square().mean(),
                    lambda x=x: critic(generator(x)).square().mean(),
                ],
                strict=True,
            ):
                optimizer.zero_grad()
                scaler.scale(loss()).backward()
                scaler.step(optimizer)
                scaler.update()
    steps = watcher.history.steps()
    assert steps["loss_scale"].tolist() == [2048.0, 512.0] * 3
    assert steps["grad_norm"].max() < 50  # in true units


def test_one_that_another_loop_uses_is_left_alone():
    """A scaler that is at hand and scales the losses of another model counts for none."""
    model, other = _model(1), _model(2)
    optimizer, others = _optimizer(model), _optimizer(other)
    scaler = _scaler()
    with gradwatch.watch(model, optimizer) as watcher:
        for _ in range(3):
            scaler.scale(other(_batch()).square().mean()).backward()
            scaler.step(others)
            scaler.update()
            model(_batch()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert watcher.history.steps()["loss_scale"].tolist() == [1.0] * 3


def test_each_thread_has_its_own():
    """Two threads that train at once: each model is recorded with the scaler of its thread."""
    models = [_model(1), _model(2)]
    optimizers, scalers = list(map(_optimizer, models)), [_scaler(64.0), _scaler(256.0)]
    meeting = threading.Barrier(2, timeout=600)

    def train(i):
        for _ in range(3):
            meeting.wait()
            scalers[i].scale(models[i](_batch()).square().mean()).backward()
            scalers[i].step(optimizers[i])
            scalers[i].update()
            optimizers[i].zero_grad()

    with ExitStack() as stack:
        watchers = [
            stack.enter_context(gradwatch.watch(*pair))
            for pair in zip(models, optimizers, strict=True)
        ]
        threads = [threading.Thread(target=train, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = [watcher.history.steps()["loss_scale"].tolist() for watcher in watchers]
    assert found == [[64.0] * 3, [256.0] * 3]


def test_nothing_stays_replaced():
    """The entry of the backward is torch's own again once the optimizer has stepped."""
    before = torch.autograd._engine_run_backward
    model, scaler = _model(), _scaler()
    optimizer = _optimizer(model)
    with gradwatch.watch(model, optimizer):
        assert torch.autograd._engine_run_backward is not before
        for _ in range(2):
            scaler.scale(model(_batch()).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert torch.autograd._engine_run_backward is before
    watcher = gradwatch.watch(_model()).attach()
    watcher.close()
    assert torch.autograd._engine_run_backward is before
    del watcher
    gc.collect()

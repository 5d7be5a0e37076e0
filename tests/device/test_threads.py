"""Hooks of a backward run in a thread of the device's: nothing depends on which thread it is."""

import math
import sys
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradwatch
from gradwatch.hooks.callers import callers
from gradwatch.hooks.graph import graph_under_way
from gradwatch.step.registry import OptimizerRegistry
from tests.support import device


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def _there(on_device):
    return device.to if on_device else lambda model: model


def _batches(on_device, count=4):
    torch.manual_seed(1)
    batches = [torch.randn(8, 4) for _ in range(count)]
    return list(map(device.tensor, batches)) if on_device else batches


class _Root(nn.Module):
    """Gives back what it is given; the slope of a root at 0 makes its gradient NaN."""

    def forward(self, x):
        return x + (x - x.detach()).sqrt()


def _plain(model, batches, watcher, optimizer):
    for step, x in enumerate(batches):
        factor = math.nan if step == 2 else 1.0
        (model(x).square().mean() * factor).backward()
        optimizer.step()
        optimizer.zero_grad()


def _closure(model, batches, watcher, optimizer):
    for step, x in enumerate(batches):
        factor = math.nan if step == 2 else 1.0

        def closure(x=x, factor=factor):
            optimizer.zero_grad()
            loss = model(x).square().mean() * factor
            loss.backward()
            return loss

        optimizer.step(closure)


def _in_the_model(model, batches, watcher, optimizer):
    for x in batches:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def _explained(loop, on_device):
    model = _there(on_device)(_model())
    if loop is _in_the_model:
        model.append(_Root())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with gradwatch.watch(model, optimizer, on_nonfinite="explain") as watcher:
        loop(model, _batches(on_device), watcher, optimizer)
    return list(map(repr, watcher.explanations))


@pytest.mark.parametrize("loop", [_plain, _closure, _in_the_model], ids=lambda one: one.__name__)
def test_an_explanation_is_that_of_the_cpu(loop):
    """Origin, module, operation, line and examples are the same, also of a loss in the loop."""
    expected = _explained(loop, on_device=False)
    assert expected
    assert "origin='operation'" in expected[0]
    assert _explained(loop, on_device=True) == expected


def test_a_backward_that_is_a_step_is_explained_from_the_loop():
    """Without an optimizer the error is raised in that thread, and has the line of the loss."""
    model = device.to(_model())

    def train():
        with gradwatch.watch(model, on_nonfinite="raise", explain=True):
            for step, x in enumerate(_batches(on_device=True)):
                (model(x).square().mean() * (math.nan if step == 2 else 1.0)).backward()
                model.zero_grad()

    with pytest.raises(gradwatch.NonFiniteGradientError, match="This is mul") as raised:
        train()
    assert "test_threads.py" in str(raised.value)


def test_the_frames_of_the_loop_are_found():
    """From a hook, those who called the backward come after the frames of the hook's thread."""
    model, seen, graphs = device.to(_model()), [], []
    model[0].weight.register_hook(
        lambda gradient: (
            seen.append([one.f_code.co_name for one in callers(sys._getframe())]),
            graphs.append(graph_under_way()),
            None,
        )[-1]
    )
    model(_batches(on_device=True)[0]).sum().backward()
    assert "test_the_frames_of_the_loop_are_found" in seen[0]
    assert graphs[0].nodes


class _Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.reentrant = reentrant

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [False, True])
def test_micro_batches_of_checkpointed_models(reentrant):
    """Backwards inside of a backward are one micro-batch, as on the CPU."""
    records = []
    for on_device in (False, True):
        torch.manual_seed(0)
        model = _there(on_device)(_Checkpointed(reentrant))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        with gradwatch.watch(model, optimizer) as watcher:
            for i, x in enumerate(_batches(on_device)):
                model(x.requires_grad_()).square().mean().backward()
                if i % 2:
                    optimizer.step()
                    optimizer.zero_grad()
        records.append(watcher.history.steps()[["micro_batches", "grad_norm"]].to_numpy(float))
    assert records[0][:, 0].tolist() == [2.0, 2.0]
    assert records[1] == pytest.approx(records[0], rel=1e-6)


def test_a_backward_in_a_thread_of_the_users():
    """A backward may be called in any thread of the program's, whoever steps."""
    norms = []
    for threaded in (False, True):
        model = device.to(_model())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        with gradwatch.watch(model, optimizer, clip=0.05, on_nonfinite="skip") as watcher:
            for x in _batches(on_device=True):
                backward = model(x).square().mean().backward
                if threaded:
                    thread = threading.Thread(target=backward)
                    thread.start()
                    thread.join()
                else:
                    backward()
                optimizer.step()
                optimizer.zero_grad()
        norms.append(watcher.history.steps()["grad_norm"].tolist())
    assert norms[0] == norms[1]


def _failing(monkeypatch, error):
    """Has the third call of what the end of a backward calls fail."""
    add, calls = OptimizerRegistry.add, []

    def fail(self, *args):
        calls.append(None)
        if len(calls) == 3:
            raise error
        return add(self, *args)

    monkeypatch.setattr(OptimizerRegistry, "add", fail)


def _step_through(**options):
    model = device.to(_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with gradwatch.watch(model, optimizer, **options) as watcher:
        for x in _batches(on_device=True):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return watcher


def test_a_hook_of_ours_that_fails_ends_the_watching_alone(monkeypatch):
    """The training goes on, with a warning that says what has failed."""
    _failing(monkeypatch, ZeroDivisionError("by accident"))
    with pytest.warns(UserWarning, match="ZeroDivisionError: by accident"):
        watcher = _step_through()
    assert len(watcher.history.steps()) == 2


@pytest.mark.parametrize("error", [ZeroDivisionError("by accident"), KeyboardInterrupt("now")])
def test_what_must_get_through_does(monkeypatch, error):
    """An error where gradwatch clips, and an interrupt at any time, reach the loop as they are."""
    _failing(monkeypatch, error)
    options = {} if isinstance(error, KeyboardInterrupt) else {"clip": 1.0}
    with pytest.raises(type(error), match=str(error)):
        _step_through(**options)


def test_autocast_of_the_device_is_that_of_the_training():
    """A forward in autocast is run again in autocast: the explanation names the low precision."""
    model = device.to(_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with gradwatch.watch(model, optimizer, on_nonfinite="explain") as watcher:
        x = _batches(on_device=True)[0] * 1e6
        with torch.autocast(device.DEVICE.type, dtype=torch.float16):
            out = model(x)
        out.float().square().mean().backward()
        optimizer.step()
    (found,) = watcher.explanations
    assert found.result_dtype == "float16"

"""On an accelerator nothing waits for the device: the CPU stands in for one, and waits are counted."""

import math

import pytest
import torch

import gradwatch
from gradwatch.testing import late_readings
from tests.support import zoo
from tests.support.calls import CountCalls

STEPS, POISONED = 6, 3
COLUMNS = ["grad_norm", "grad_norm_clipped", "clip_coef", "outcome", "loss_scale", "lr"]


def _train(watch, *, scaled=False, fused=False, poisoned=None):
    """Trains six steps of two micro-batches; returns the waits, the watcher and the weights."""
    model = zoo.small()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", 1024.0, growth_interval=2, enabled=scaled)
    watcher = watch(model, optimizer, scaler)
    with CountCalls() as counter:
        for step in range(STEPS):
            for _ in range(2):
                loss = model(torch.randn(8, 4)).square().mean()
                factor = math.inf if step == poisoned else 1.0
                scaler.scale(loss * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    if watcher is not None:
        watcher.close()
    return counter.waits, watcher, [p.detach() for p in model.parameters()]


def _watch(**options):
    return lambda model, optimizer, scaler: gradwatch.watch(
        model, optimizer, scaler=scaler, **options
    ).attach()


def _unwatched(model, optimizer, scaler):
    return None


STATISTICS = ("max", "mean", "std", "zeros", "weight_norm", "update_ratio")
QUIET = [
    ({}, {}),
    ({"clip": 0.05}, {}),
    ({"clip": gradwatch.ClipByNorm(0.05, norm_type=math.inf)}, {}),
    ({"statistics": STATISTICS}, {}),
    ({}, {"scaled": True}),
    ({}, {"scaled": True, "fused": True}),
    ({"clip": 0.05}, {"scaled": True, "fused": True, "poisoned": POISONED}),
    ({}, {"poisoned": POISONED}),
]


@pytest.mark.parametrize(("options", "run"), QUIET)
def test_nothing_waits_for_the_device(options, run):
    """Watching, clipping, statistics and a fused optimizer's scaler add no host wait at all."""
    with late_readings(polls=3):
        watched, _, _ = _train(_watch(**options), **run)
    unwatched, _, _ = _train(_unwatched, **run)
    assert watched == unwatched


@pytest.mark.parametrize(("options", "run"), QUIET)
def test_numbers_that_come_late_are_the_same(options, run):
    """Records, statistics and weights equal those of a run whose numbers are at hand."""
    with late_readings(polls=3):
        _, late, late_weights = _train(_watch(**options), **run)
    _, prompt, weights = _train(_watch(**options), **run)
    for one, other in zip(late_weights, weights, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    expected = prompt.history.steps()[COLUMNS]
    if run.get("poisoned") is not None:  # a clip is not known to be none where the norm is NaN
        expected = expected.drop(columns="clip_coef")
    assert late.history.steps()[expected.columns].equals(expected)
    assert late.history.parameters().equals(prompt.history.parameters())


def test_what_went_bad_is_named_late():
    """The parameter and the micro-batch are right; the count was gone with the gradient."""
    with late_readings(polls=3):
        _, late, _ = _train(_watch(), scaled=True, fused=True, poisoned=POISONED)
    _, prompt, _ = _train(_watch(), scaled=True, fused=True, poisoned=POISONED)
    told = ["step", "micro_batch", "kind", "parameter", "module"]
    assert late.history.events()[told].equals(prompt.history.events()[told])
    assert late.events[0].nan_count == -1
    assert prompt.events[0].nan_count > 0


def test_a_step_arrives_while_the_next_ones_run():
    """Records come in order and late, and reading the newest one waits for it."""
    with late_readings(polls=2):
        x = torch.ones(1, requires_grad=True)
        optimizer = torch.optim.SGD([x], lr=0.1)
        sink = gradwatch.testing.CapturingSink()
        with gradwatch.watch({"x": x}, optimizer, sinks=[sink]) as watcher:
            for _ in range(3):
                (2 * x).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            assert watcher.last.step == 3
    assert [record.step for record in sink.steps] == [1, 2, 3]


def _noted(divisor):
    """Trains with a scaler and two micro-batches a step, whose losses an adapter notes."""
    x = torch.ones(1, requires_grad=True)
    optimizer, scaler = torch.optim.SGD([x], lr=0.0), torch.amp.GradScaler("cpu", init_scale=8.0)
    with gradwatch.watch({"x": x}, optimizer, scaler=scaler) as watcher, CountCalls() as calls:
        for value in range(4):
            loss = scaler.scale((value * x).sum() / 2)
            loss.backward()
            watcher.note_loss(loss, divisor)
            if value % 2:
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
    return calls.waits, watcher.history.steps().loss.tolist()


def test_a_noted_loss_comes_late():
    """It is not waited for, and is the mean of what was noted, undivided and without the scale."""
    with late_readings(polls=3):
        waits, losses = _noted(2.0)
    assert waits == 2  # those of scaler.step() itself
    assert losses == _noted(2.0)[1] == [0.5, 2.5]


def test_a_noted_loss_that_may_be_divided():
    """Of several backwards with an unknown divisor nothing is known."""
    _, losses = _noted(None)
    assert all(map(math.isnan, losses))


@pytest.mark.parametrize(("fused", "looks"), [(True, 0), (False, STEPS)])
def test_skipping_looks_once_per_step(fused, looks):
    """A fused optimizer is told on the device; for others the host has to look at the norm."""
    run = {"fused": fused, "poisoned": POISONED}
    with late_readings(polls=3):
        watched, watcher, weights = _train(_watch(on_nonfinite="skip"), **run)
    unwatched, _, _ = _train(_unwatched, **run)
    assert watched - unwatched == looks
    assert list(watcher.history.steps()["outcome"]).count("skipped_nonfinite") == 1
    assert all(torch.isfinite(weight).all() for weight in weights)

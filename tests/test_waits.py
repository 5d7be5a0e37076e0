"""On an accelerator nothing waits for the device, and waits are counted.

Here the CPU is treated like one; in `tests/device` these tests run on a stand-in for one.
"""

import math

import pytest
import torch

import gradwatch
from tests.support import zoo
from tests.support.places import HOST, LATE

STEPS, POISONED = 6, 3
COLUMNS = ["grad_norm", "grad_norm_clipped", "clip_coef", "outcome", "loss_scale", "lr"]


def _train(place, watch, **options):
    """Trains six steps of two micro-batches; returns the waits, the watcher and the weights."""
    with place.late(3):
        return _train_there(place, watch, **options)


def _train_there(place, watch, *, scaled=False, fused=False, poisoned=None):
    torch.manual_seed(1)
    model = place.to(zoo.small())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler(place.type, 1024.0, growth_interval=2, enabled=scaled)
    watcher = watch(model, optimizer, scaler)
    with place.counting() as counter:
        for step in range(STEPS):
            for _ in range(2):
                loss = model(place.tensor(torch.randn(8, 4))).square().mean()
                factor = math.inf if step == poisoned else 1.0
                scaler.scale(loss * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    if watcher is not None:
        watcher.close()
    return counter.waits, watcher, [p.detach().cpu() for p in model.parameters()]


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
def test_nothing_waits_for_the_device(options, run, away):
    """Watching, clipping, statistics and a fused optimizer's scaler add no host wait at all."""
    watched, _, _ = _train(away, _watch(**options), **run)
    unwatched, _, _ = _train(away, _unwatched, **run)
    assert watched == unwatched


@pytest.mark.parametrize(("options", "run"), QUIET)
def test_numbers_that_come_late_are_the_same(options, run, away):
    """Records, statistics and weights equal those of a run whose numbers are at hand."""
    _, late, late_weights = _train(away, _watch(**options), **run)
    _, prompt, weights = _train(HOST, _watch(**options), **run)
    for one, other in zip(late_weights, weights, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    expected = prompt.history.steps()[COLUMNS]
    if run.get("poisoned") is not None:  # a clip is not known to be none where the norm is NaN
        expected = expected.drop(columns="clip_coef")
    assert late.history.steps()[expected.columns].equals(expected)
    assert late.history.parameters().equals(prompt.history.parameters())


def test_what_went_bad_is_named_late(away):
    """The parameter and the micro-batch are right; the count was gone with the gradient."""
    _, late, _ = _train(away, _watch(), scaled=True, fused=True, poisoned=POISONED)
    _, prompt, _ = _train(HOST, _watch(), scaled=True, fused=True, poisoned=POISONED)
    told = ["step", "micro_batch", "kind", "parameter", "module"]
    assert late.history.events()[told].equals(prompt.history.events()[told])
    assert late.events[0].nan_count == -1
    assert prompt.events[0].nan_count > 0


def test_a_step_arrives_while_the_next_ones_run(away):
    """Records come in order and late, and reading the newest one waits for it."""
    with away.late(2):
        x = away.tensor(torch.ones(1)).requires_grad_()
        optimizer = torch.optim.SGD([x], lr=0.1)
        sink = gradwatch.testing.CapturingSink()
        with gradwatch.watch({"x": x}, optimizer, sinks=[sink]) as watcher:
            for _ in range(3):
                (2 * x).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            assert watcher.last.step == 3
    assert [record.step for record in sink.steps] == [1, 2, 3]


def _noted(place, divisor):
    """Trains with a scaler and two micro-batches a step, whose losses an adapter notes."""
    x = place.tensor(torch.ones(1)).requires_grad_()
    optimizer = torch.optim.SGD([x], lr=0.0)
    scaler = torch.amp.GradScaler(place.type, init_scale=8.0)
    watch = gradwatch.watch({"x": x}, optimizer, scaler=scaler)
    with place.late(3), watch as watcher, place.counting() as calls:
        for value in range(4):
            loss = scaler.scale((value * x).sum() / 2)
            loss.backward()
            watcher.note_loss(loss, divisor)
            if value % 2:
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
    return calls.waits, watcher.history.steps().loss.tolist()


def test_a_noted_loss_comes_late(away):
    """It is not waited for, and is the mean of what was noted, undivided and without the scale."""
    waits, losses = _noted(away, 2.0)
    assert waits == 2  # those of scaler.step() itself
    assert losses == _noted(HOST, 2.0)[1] == [0.5, 2.5]


def test_a_noted_loss_that_may_be_divided():
    """Of several backwards with an unknown divisor nothing is known."""
    _, losses = _noted(HOST, None)
    assert all(map(math.isnan, losses))


@pytest.mark.parametrize(("fused", "looks"), [(True, 0), (False, STEPS)])
def test_skipping_looks_once_per_step(fused, looks, away):
    """A fused optimizer is told on the device; for others the host has to look at the norm."""
    run = {"fused": fused, "poisoned": POISONED}
    watched, watcher, weights = _train(away, _watch(on_nonfinite="skip"), **run)
    unwatched, _, _ = _train(away, _unwatched, **run)
    # In the bad step a device is asked once more: which elements are bad.
    counted = bool(looks) and away.name != LATE.name
    assert watched - unwatched == looks + counted
    assert list(watcher.history.steps()["outcome"]).count("skipped_nonfinite") == 1
    assert all(torch.isfinite(weight).all() for weight in weights)

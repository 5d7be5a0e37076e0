"""Gradients that a loop changes, throws away, or does not step with: recorded as on the host."""

import math

import pytest
import torch

import gradwatch
from tests.support import zoo
from tests.support.places import HOST

STEPS = 8
COLUMNS = ["micro_batches", "grad_norm_clipped", "outcome", "discarded", "loss_scale"]


def _losses(place, model, poisoned=()):
    for step in range(STEPS):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        yield step, model(place.tensor(x)).square().mean() * (math.nan if step in poisoned else 1.0)


def _sgd(parameters, fused=False):
    return torch.optim.SGD(list(parameters), lr=0.05, fused=fused)


def _alternate(place, model, optimizers):
    for step in range(STEPS):
        for number, optimizer in enumerate(optimizers):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(2 * step + number))
            bad = (step, number) in ((2, 0), (4, 1))
            (model(place.tensor(x)).square().mean() * (math.nan if bad else 1.0)).backward()
            optimizer.step()
            model.zero_grad()


def _zeroed(place, model, optimizers):
    for step, loss in _losses(place, model):
        loss.backward()
        if step % 3 != 1:
            optimizers[0].step()
        optimizers[0].zero_grad(set_to_none=False)


def _past_the_counter(place, model, optimizers):
    for _, loss in _losses(place, model):
        loss.backward()
        for parameter in model.parameters():
            parameter.grad.data.mul_(0.5)
        optimizers[0].step()
        model.zero_grad()


def _halves(model, fused):
    parameters = list(model.parameters())
    return [_sgd(parameters[:2], fused), _sgd(parameters[2:], fused)]


LOOPS = {
    "of another optimizer": (_alternate, lambda model: _halves(model, fused=True), "skip"),
    "zeroed": (_zeroed, lambda model: [_sgd(model.parameters())], "record"),
    "zeroed, skip": (_zeroed, lambda model: [_sgd(model.parameters())], "skip"),
    "past the counter": (_past_the_counter, lambda model: [_sgd(model.parameters())], "record"),
}


def _recorded(place, name, polls):
    loop, optimizers, policy = LOOPS[name]
    model = place.to(zoo.small())
    chosen = optimizers(model)
    with place.late(polls), gradwatch.watch(model, chosen, on_nonfinite=policy) as watcher:
        loop(place, model, chosen)
    events = watcher.history.events()[["step", "optimizer", "kind", "parameter"]]
    return watcher.history.steps()[COLUMNS], events


@pytest.mark.parametrize("polls", [1, 6])
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_that_does_more_than_step_is_recorded_as_on_the_host(name, polls, place):
    """Events, discarded windows, micro-batches and norms after a clip that leaves no trace."""
    expected, events_then = _recorded(HOST, name, 1)
    found, events = _recorded(place, name, polls)
    for column in COLUMNS:
        values = expected[column].tolist()
        if column in ("grad_norm_clipped", "loss_scale"):
            values = pytest.approx(values, rel=1e-6, nan_ok=True)
        assert found[column].tolist() == values, column
    assert events.to_dict("list") == events_then.to_dict("list")


def _with_scaler(place, *, watched=True, told=True, managed=False, **options):
    model = place.to(zoo.small())
    optimizer = _sgd(model.parameters())
    scaler = torch.amp.GradScaler(place.type, 1024.0, growth_interval=3)
    watcher = None
    if watched:
        options = {**options, "scaler": scaler} if told else options
        watcher = gradwatch.watch(model, optimizer, **options).attach()
    waits = []
    with place.late(2):
        for _, loss in _losses(place, model, poisoned=(0, 3, 4)):
            with place.counting() as counts:
                if managed:
                    watcher.backward(loss)
                    watcher.step()
                else:
                    scaler.scale(loss).backward()
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad()
            waits.append(counts.waits)
        if watched:
            watcher.close()
    return None if watcher is None else watcher.history, waits


@pytest.mark.parametrize("setting", [{}, {"told": False}, {"managed": True}], ids=str)
def test_a_step_that_a_scaler_leaves_out_costs_no_wait(setting, place):
    """The scaler has waited for its own flag, and what it did with it shows on the host."""
    _, unwatched = _with_scaler(place, watched=False)
    history, waits = _with_scaler(place, **setting)
    assert waits == unwatched
    expected, _ = _with_scaler(HOST, **setting)
    assert history.steps()["outcome"].tolist() == expected.steps()["outcome"].tolist()
    assert history.steps()["loss_scale"].tolist() == expected.steps()["loss_scale"].tolist()


@pytest.mark.parametrize("told", [True, False])
def test_nan_of_a_step_that_a_scaler_leaves_out_are_counted(told, place):
    """If bad steps are skipped, the host waits while the gradient is there: once per step.

    In those steps in which unchanged gradients are measured again, it waits for that as well.
    """
    history, waits = _with_scaler(place, told=told, on_nonfinite="skip")
    expected, _ = _with_scaler(HOST, told=told, on_nonfinite="skip")
    counted = ["step", "kind", "parameter", "nan_count", "inf_count"]
    events, events_then = history.events()[counted], expected.events()[counted]
    assert events.to_dict("list") == events_then.to_dict("list")
    _, unwatched = _with_scaler(place, watched=False)
    good = [step for step in range(1, STEPS) if step not in (3, 4)]
    assert [waits[step] - unwatched[step] for step in good] == [2, 2, 1, 2, 1]

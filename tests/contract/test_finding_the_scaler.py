"""A GradScaler that the loop uses is found by itself; one that it does not use is left alone."""

import math

import pytest
import torch

import gradwatch
from tests.support import zoo

STEPS = 5


def _train(fused, passed, *, poisoned=None, scaled=True):
    model = zoo.small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    options = {"scaler": scaler} if passed else {}
    with gradwatch.watch(model, optimizer, **options) as watcher:
        for step in range(STEPS):
            loss = model(torch.randn(8, 4)).square().mean() * (math.inf if step == poisoned else 1)
            if scaled:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            else:
                loss.backward()
                optimizer.step()
            optimizer.zero_grad()
    return watcher.history.steps().drop(columns="time_s")


@pytest.mark.parametrize("poisoned", [None, 0, 3], ids=["clean", "first step", "fourth step"])
@pytest.mark.parametrize("fused", [False, True])
def test_it_is_found(fused, poisoned):
    """Norms in true units, the loss scale and the skipped steps are as if it had been passed."""
    found = _train(fused, passed=False, poisoned=poisoned)
    assert found.equals(_train(fused, passed=True, poisoned=poisoned))
    assert found["loss_scale"].iloc[0] == 1024.0
    if poisoned is not None:
        assert found["outcome"].iloc[poisoned] == "skipped_scaler"


def test_one_of_an_earlier_run_is_left_alone():
    """A scaler that has scaled losses before, and does not serve this optimizer, counts for none."""
    earlier = torch.amp.GradScaler("cpu", init_scale=512.0)
    earlier.scale(torch.ones(()))
    steps = _train(False, passed=False, scaled=False)
    assert steps["loss_scale"].tolist() == [1.0] * STEPS
    plain = _train(False, passed=False, scaled=False)
    assert steps["grad_norm"].tolist() == plain["grad_norm"].tolist()


def test_of_several_the_serving_one_counts():
    """Where two scalers are alive, the one that steps the optimizer is taken."""
    other = torch.amp.GradScaler("cpu", init_scale=512.0)
    other.scale(torch.ones(()))
    assert _train(False, passed=False)["loss_scale"].tolist() == [1024.0] * STEPS


def test_without_an_optimizer_none_is_taken():
    """Where nothing steps, nobody can tell whether a scaler is in use: the norms stay as they are."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    x = torch.ones(1, requires_grad=True)
    with gradwatch.watch({"x": x}) as watcher:
        (3 * x).sum().backward()
    assert watcher.last.grad_norm == 3.0
    assert watcher.last.loss_scale == 1.0


def test_none_is_taken_for_steps_with_a_closure():
    """Scalers do not step with closures: one that is at hand is that of another loop."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # in a variable of this function
    scaler.scale(torch.ones(()))
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(1, 2)).sum()
        loss.backward()
        return loss

    with gradwatch.watch(model, optimizer) as watcher:
        for _ in range(2):
            optimizer.step(closure)
    assert watcher.history.steps()["grad_norm"].tolist() == pytest.approx([math.sqrt(3)] * 2)
    assert scaler.is_enabled()


@pytest.mark.parametrize("fused", [False, True])
def test_it_is_found_wherever_it_is_kept(fused):
    """No variable of the loop refers to it: the graph of the loss shows it, from step 1 on."""
    model = zoo.small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    kept = {"of the loop": {"scaler": torch.amp.GradScaler("cpu", init_scale=1024.0)}}
    with gradwatch.watch(model, optimizer) as watcher:
        for step in range(STEPS):
            loss = model(torch.randn(8, 4)).square().mean() * (math.inf if step == 0 else 1)
            kept["of the loop"]["scaler"].scale(loss).backward()
            kept["of the loop"]["scaler"].unscale_(optimizer)
            kept["of the loop"]["scaler"].step(optimizer)
            kept["of the loop"]["scaler"].update()
            optimizer.zero_grad()
    steps = watcher.history.steps()
    assert steps["outcome"].tolist() == ["skipped_scaler", *["applied"] * (STEPS - 1)]
    assert steps["loss_scale"].tolist() == [1024.0, *[512.0] * (STEPS - 1)]
    assert steps["grad_norm"].iloc[1:].max() < 50  # in true units


def test_two_scalers_of_one_model():
    """Each optimizer is recorded with the scaler that steps it."""
    model = zoo.small()
    first, *rest = model.parameters()
    optimizers = [torch.optim.SGD([first], lr=0.0), torch.optim.SGD(rest, lr=0.0)]
    scalers = [torch.amp.GradScaler("cpu", init_scale=scale) for scale in (64.0, 256.0)]
    with gradwatch.watch(model, optimizers) as watcher:
        for _ in range(2):
            for optimizer, scaler in zip(optimizers, scalers, strict=True):
                model.zero_grad()
                scaler.scale(model(torch.ones(8, 4)).square().mean()).backward()
                scaler.step(optimizer)
                scaler.update()
    steps = watcher.history.steps()
    assert steps["loss_scale"].tolist() == [64.0, 256.0] * 2
    norms = steps["grad_norm"].tolist()
    assert norms[:2] == pytest.approx(norms[2:])


def test_the_entry_of_the_backward_is_torchs_own_again():
    """It is wrapped until every optimizer has stepped, or the watcher is closed or dropped."""
    before = torch.autograd._engine_run_backward
    _train(False, passed=False)
    assert torch.autograd._engine_run_backward is before
    gradwatch.watch(zoo.small()).attach().close()
    assert torch.autograd._engine_run_backward is before

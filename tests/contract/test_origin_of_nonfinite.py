"""Where a NaN came from: only a backward that made it is blamed, and no order is named that is not known."""

import math
from collections.abc import Callable
from contextlib import nullcontext

import pandas as pd
import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.testing import late_readings
from tests.support import zoo

from .poison import bad_events

STEPS, BAD_STEP = 12, 7
Loop = Callable[[int, nn.Sequential, torch.optim.Optimizer], None]


def train(loop: Loop, **options: object) -> tuple[gradwatch.Watcher, pd.DataFrame]:
    """Trains a small network; returns its watcher and the events of the step that goes bad first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with gradwatch.watch(model, optimizer, **options) as watcher:
        for step in range(1, STEPS + 1):
            loop(step, model, optimizer)
    events = bad_events(watcher)
    return watcher, events[events["step"] == events["step"].min()]


def backward(model: nn.Module, factor: float = 1.0) -> None:
    """Runs a backward with finite gradients."""
    (model(torch.randn(8, 4)).square().mean() * factor).backward()


def advice(watcher: gradwatch.Watcher) -> str:
    """What the report says to do about the NaN or Inf."""
    return next(f.advice for f in watcher.report().findings if f.kind in ("nan", "inf"))


def write_element(model: nn.Sequential) -> None:
    """Write a NaN into one gradient, in place."""
    model[0].bias.grad[2] = math.nan


def write_through_data(model: nn.Sequential) -> None:
    """Write it past the version counter."""
    model[0].bias.grad.data[2] = math.nan


def clip_by_infinity(model: nn.Sequential) -> None:
    """Clip by infinity, as people do to log the norm."""
    nn.utils.clip_grad_norm_(model.parameters(), math.inf)


def divide_by_zero(model: nn.Sequential) -> None:
    """Divide every gradient by a count of 0."""
    for parameter in model.parameters():
        parameter.grad.div_(0.0)


def replace(model: nn.Sequential) -> None:
    """Set another tensor as the gradient."""
    model[0].bias.grad = torch.full((8,), math.inf)


WRITES = [write_element, write_through_data, clip_by_infinity, divide_by_zero, replace]
OF_ONE = (write_element, write_through_data, replace)


@pytest.mark.parametrize("late", [False, True], ids=["at hand", "late"])
@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("write", WRITES)
def test_made_after_the_last_backward(
    write: Callable[[nn.Sequential], None], accumulated: int, late: bool
) -> None:
    """What the loop writes between backward and step is no fault of a micro-batch, nor has it an order."""
    # A write past the version counter is found where a look is due: in step 8.
    bad = 8 if write is write_through_data else BAD_STEP
    factor = 1e25 if write is clip_by_infinity else 1.0

    def loop(step: int, model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        for _ in range(accumulated):
            backward(model, factor if step == bad else 1.0)
        if step == bad:
            write(model)
        optimizer.step()

    if late and write is clip_by_infinity:
        pytest.skip("on a device a norm beyond float32 cannot be told from an Inf")
    with late_readings() if late else nullcontext():
        watcher, events = train(loop)
    event = events.iloc[0]
    assert event["step"] == bad
    assert event["micro_batch"] == 0
    assert event["parameter"] == ("0.bias" if write in OF_ONE else "0.weight")
    assert f"made after the last backward of step {bad}" in event["message"]
    assert "order" not in event["message"]
    assert "batch is" in advice(watcher) or "clip" in advice(watcher)
    assert "Check the data" not in advice(watcher)


def test_the_clip_of_an_overflowing_norm_is_named() -> None:
    """A clip that turns finite gradients into NaN is told as such, after the overflow that led to it."""

    def loop(step: int, model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        backward(model, 1e25 if step == BAD_STEP else 1.0)
        clip_by_infinity(model)
        optimizer.step()

    watcher, events = train(loop)
    kinds = [one.kind for one in watcher.events if one.step == BAD_STEP]
    assert kinds[:2] == ["overflow", "nan"]
    assert "beyond float32: a clip" in events.iloc[0]["message"]
    assert "gradwatch's own clip" in advice(watcher)


@pytest.mark.parametrize("late", [False, True], ids=["at hand", "late"])
@pytest.mark.parametrize("write", [write_element, divide_by_zero, replace])
def test_made_between_micro_batches(write: Callable[[nn.Sequential], None], late: bool) -> None:
    """What the loop writes between two backwards is blamed on neither."""

    def loop(step: int, model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        for micro_batch in range(3):
            backward(model)
            if step == BAD_STEP and micro_batch == 1:
                write(model)
        optimizer.step()

    with late_readings() if late else nullcontext():
        _, events = train(loop)
    event = events.iloc[0]
    assert (event["step"], event["micro_batch"]) == (BAD_STEP, 0)
    assert (
        f"made between two backwards, micro-batches 2 and 3 of step {BAD_STEP}" in event["message"]
    )


def test_what_does_not_arrive_is_not_blamed_on_the_backward() -> None:
    """A parameter that a micro-batch does not reach went bad before it."""

    def loop(step: int, model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        backward(model)
        if step == BAD_STEP:
            write_through_data(model)  # nothing shows it at the time
        model[2](torch.randn(3, 8)).sum().backward()
        optimizer.step()

    _, events = train(loop)
    assert events.iloc[0]["micro_batch"] == 0
    assert "made between two backwards, micro-batches 1 and 2" in events.iloc[0]["message"]


def test_gradients_that_the_loop_sets_itself_have_no_micro_batch() -> None:
    """torch.autograd.grad() is no backward that is seen: neither an order nor a micro-batch is named."""

    def loop(step: int, model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        loss = model(torch.randn(8, 4)).square().mean()
        factor = math.inf if step == BAD_STEP else 1.0
        parameters = list(model.parameters())
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters), strict=True
        ):
            parameter.grad = gradient * factor
        optimizer.step()

    watcher, events = train(loop)
    assert (events.iloc[0]["step"], events.iloc[0]["micro_batch"]) == (BAD_STEP, 0)
    assert f"in step {BAD_STEP}, where no backward was seen" in events.iloc[0]["message"]
    assert "No backward was seen to make it" in advice(watcher)


@pytest.mark.parametrize("clears", [False, True], ids=["kept", "zeroed"])
def test_gradients_left_from_a_bad_step(clears: bool) -> None:
    """A NaN that nobody has zeroed is not blamed on the next micro-batch; once zeroed it is gone."""

    def loop(step: int, model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        inputs = torch.randn(8, 4)
        if step == BAD_STEP:
            inputs[0, 0] = math.nan
        model(inputs).square().mean().backward()
        optimizer.step()
        if clears or step != BAD_STEP:
            optimizer.zero_grad(set_to_none=False)

    watcher, events = train(loop, on_nonfinite="skip")
    assert events.iloc[0]["micro_batch"] == 1
    events = bad_events(watcher)
    assert set(events["step"]) == {BAD_STEP} if clears else {BAD_STEP, BAD_STEP + 1}
    if not clears:
        later = events[events["step"] == BAD_STEP + 1].iloc[0]
        assert later["micro_batch"] == 0
        assert "left in it since an earlier step" in later["message"]


def test_a_new_nan_after_zero_grad_is_blamed_on_its_own_batch() -> None:
    """Two bad batches in a row are two bad batches."""

    def loop(step: int, model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        inputs = torch.randn(8, 4)
        if step in (BAD_STEP, BAD_STEP + 1):
            inputs[0, 0] = math.nan
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=step % 2 == 0)

    watcher, _ = train(loop, on_nonfinite="skip")
    events = bad_events(watcher)
    assert list(events["micro_batch"]) == [1, 1]
    assert all("the first in backward order" in message for message in events["message"])


def test_bad_weights_are_named_before_the_batch() -> None:
    """Where weights were NaN or Inf before the backward, they are named, not the batch."""

    def loop(step: int, model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
        if step == BAD_STEP - 1:
            with torch.no_grad():
                model[2].weight.div_(0.0)

    watcher, events = train(loop)
    event = events.iloc[0]
    assert (event["step"], event["micro_batch"]) == (BAD_STEP, 1)
    assert "Weights were NaN or Inf before that (2.weight)." in event["message"]
    assert "the batch is not the cause" in advice(watcher)


def test_an_optimizer_that_steps_inside_the_backward_is_no_bad_weight() -> None:
    """Weights that the same backward has spoiled are not named as its cause."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def step(parameter: torch.Tensor) -> None:
        optimizers[parameter].step()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    with gradwatch.watch(model) as watcher:
        for number in range(4):
            inputs = torch.randn(8, 4)
            if number == 2:
                inputs[0, 0] = math.nan
            model(inputs).square().mean().backward()
            for optimizer in optimizers.values():
                optimizer.zero_grad(set_to_none=False)
    events = bad_events(watcher)
    assert not events.empty
    first = events[events["step"] == events["step"].min()]
    assert not any("Weights were" in message for message in first["message"])


@pytest.mark.parametrize("call", ["flush", "state_dict"])
def test_a_flush_before_the_first_step_makes_no_step(call: str) -> None:
    """A checkpoint before training, or one in the middle of the first window, adds no step of its own."""
    for when in (0, 1):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with gradwatch.watch(model) as watcher:
            for number in range(6):
                if number == when:
                    getattr(watcher, call)()
                model(torch.ones(4, 3)).square().sum().backward()
                if number % 2:
                    optimizer.step()
                    optimizer.zero_grad()
        steps = watcher.history.steps()
        assert list(zip(steps.index, steps["optimizer"], strict=True)) == [
            (number, "SGD") for number in (1, 2, 3)
        ]


def test_a_flush_delivers_the_steps_of_a_loop_without_an_optimizer() -> None:
    """Once a loop has updated its weights by hand more than once, a flush records what it did."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    sink = gradwatch.testing.CapturingSink()
    with gradwatch.watch(model, sinks=[sink]) as watcher:
        for _ in range(5):
            model(torch.ones(4, 3)).square().sum().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(parameter.grad, alpha=0.01)
                    parameter.grad = None
        watcher.flush()
        assert [record.step for record in sink.steps] == [1, 2, 3, 4, 5]
        assert watcher.state_dict()["steps"] == {"none": 5}


def test_a_norm_that_may_be_too_large_is_not_called_inf() -> None:
    """On a device the elements are gone when their norm arrives: Inf is said only with its other reading."""

    def loop(step: int, model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        backward(model, 1e25 if step == BAD_STEP else 1.0)
        optimizer.step()

    with late_readings():
        _, events = train(loop)
    assert "Inf, or a norm beyond float32, in the gradient" in events.iloc[0]["message"]


def test_a_new_gradient_is_not_taken_for_the_one_of_the_step_before():
    """NaN in every step, zeroed each time: memory is used again, and so is the id of a gradient."""
    for _ in range(5):
        model = zoo.small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        options = {"on_nonfinite": "skip", "max_consecutive_skips": 100}
        with gradwatch.watch(model, optimizer, **options) as watcher:
            for _ in range(40):
                (model(torch.ones(3, 4)) * math.nan).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        events = watcher.history.events()
        assert not events["message"].str.contains("left in it").any()

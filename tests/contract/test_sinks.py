"""Sinks get every step once and never harm the training."""

import warnings
from typing import Any

import pytest
import torch

import gradwatch
from gradwatch.testing import CapturingSink, late_readings
from tests.support.state import identical, snapshot

from .lives import (
    Stop,
    model_and_optimizer,
    train,
)


class _Failing:
    """A sink that keeps what it gets; its `fails_at`-th write, or its close, fails."""

    def __init__(self, fails_at: int = 0, *, close: bool = False) -> None:
        self.fails_at, self.fails_to_close = fails_at, close
        self.writes = self.closed = 0
        self.steps: list[Any] = []

    def write(self, batch: Any) -> None:
        self.writes += 1
        if self.writes == self.fails_at:
            raise OSError("disk full")
        self.steps += batch.steps

    def close(self) -> None:
        self.closed += 1
        if self.fails_to_close:
            raise OSError("folder gone")


@pytest.mark.parametrize("fails_at", [1, 2, 3])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_sink_that_raises_is_tried_again(clip: float | None, fails_at: int) -> None:
    """A failing sink is told, and told when it works again; all sinks get all, the weights are the same."""
    weights = []
    for broken in (False, True):
        case, optimizer = model_and_optimizer("AdamW")
        failing, whole = _Failing(fails_at if broken else 0), CapturingSink()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with gradwatch.watch(
                case.model, optimizer, clip=clip, sinks=[failing, whole]
            ) as watcher:
                for _ in range(6):
                    train(case, optimizer, 1)
                    watcher.flush()
        assert [step.step for step in failing.steps] == [1, 2, 3, 4, 5, 6]
        assert [step.step for step in whole.steps] == [1, 2, 3, 4, 5, 6]
        assert failing.closed == 1
        assert len(caught) == (2 if broken else 0)
        if broken:
            assert issubclass(caught[0].category, gradwatch.GradwatchWarning)
            assert "_Failing" in str(caught[0].message)
            assert "disk full" in str(caught[0].message)
            assert "works again" in str(caught[1].message)
        weights.append(snapshot(case.model))
    assert identical(*weights)


def test_a_sink_that_cannot_close_is_told() -> None:
    """A failing close is a warning, and the sinks after it are closed all the same."""
    case, optimizer = model_and_optimizer()
    failing, after = _Failing(close=True), _Failing()
    with (
        pytest.warns(gradwatch.GradwatchWarning, match="folder gone"),
        gradwatch.watch(case.model, optimizer, sinks=[failing, after]),
    ):
        train(case, optimizer, 2)
    assert after.closed == 1
    assert after.writes == 1


def test_a_failing_sink_does_not_hide_the_loops_own_error() -> None:
    """The exception that ends the block is the loop's, not the sink's."""
    case, optimizer = model_and_optimizer()
    with (  # noqa: PT012, PT031
        pytest.warns(gradwatch.GradwatchWarning),
        pytest.raises(Stop),
        gradwatch.watch(case.model, optimizer, sinks=[_Failing(1, close=True)]),
    ):
        train(case, optimizer, 2)
        raise Stop


def test_a_failing_sink_under_warnings_as_errors() -> None:
    """Where the user's filters turn warnings into errors the training still goes on (this suite does so)."""
    case, optimizer = model_and_optimizer()
    with (
        warnings.catch_warnings(),
        gradwatch.watch(case.model, optimizer, sinks=[_Failing(1)]) as watcher,
    ):
        warnings.simplefilter("error")
        train(case, optimizer, 1)
        watcher.flush()
        train(case, optimizer, 2)
        watcher.flush()
    assert list(watcher.history.steps().index) == [1, 2, 3]


def test_sinks_get_every_step_once_in_order_and_are_closed() -> None:
    """A sink gets each step and event exactly once, oldest first, though the buffer is smaller than the run."""
    case, optimizer = model_and_optimizer()
    sink, counting = CapturingSink(), _Failing()
    with gradwatch.watch(
        case.model, optimizer, sinks=[sink, counting], buffer_size=4, on_nonfinite="skip"
    ) as watcher:
        for index in range(23):
            loss = case.loss(case.model, case.batch(index))
            (loss * float("nan") if index in (3, 20) else loss).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [step.step for step in sink.steps] == list(range(1, 24))
    assert [(event.step, event.kind) for event in sink.events if event.kind == "nan"] == [
        (4, "nan"),
        (21, "nan"),
    ]
    assert counting.closed == 1
    assert list(watcher.history.steps().index) == [20, 21, 22, 23]


def test_sinks_get_the_rest_when_the_loop_breaks() -> None:
    """On an exception the sinks are still given what was recorded, and closed."""
    case, optimizer = model_and_optimizer()
    sink, counting = CapturingSink(), _Failing()
    with (  # noqa: PT012
        pytest.raises(KeyboardInterrupt),
        gradwatch.watch(case.model, optimizer, sinks=[sink, counting]),
    ):
        train(case, optimizer, 3)
        raise KeyboardInterrupt
    assert [step.step for step in sink.steps] == [1, 2, 3]
    assert counting.closed == 1


def test_sinks_and_history_say_the_same() -> None:
    """What a sink got equals the rows of history.steps()."""
    case, optimizer = model_and_optimizer()
    sink = CapturingSink()
    with gradwatch.watch(case.model, optimizer, sinks=[sink], clip=0.2) as watcher:
        train(case, optimizer, 5)
    steps = watcher.history.steps()
    for field in ("grad_norm", "grad_norm_clipped", "clip_coef", "lr", "outcome", "micro_batches"):
        assert list(steps[field]) == [getattr(step, field) for step in sink.steps]


class _EachStep(CapturingSink):
    """A sink of a board whose rows must come in step with those of the loop."""

    deliver = "step"


def test_a_sink_may_have_each_step_as_it_ends() -> None:
    """With `deliver = "step"` a step is there when optimizer.step() returns; the others get it later."""
    case, optimizer = model_and_optimizer()
    each, together = _EachStep(), CapturingSink()
    with gradwatch.watch(case.model, optimizer, sinks=[together, each], clip=0.2) as watcher:
        for number in range(1, 6):
            case.loss(case.model, case.batch(number)).backward()
            optimizer.step()
            assert [step.step for step in each.steps] == list(range(1, number + 1))
            optimizer.zero_grad()
        assert not together.steps
    assert each.steps == together.steps
    assert [step.grad_norm for step in each.steps] == list(watcher.history.steps()["grad_norm"])


@pytest.mark.parametrize("policy", ["record", "skip"])
def test_events_come_with_their_step(policy: str) -> None:
    """A sink that has each step by itself gets the event of a NaN in the same batch."""
    case, optimizer = model_and_optimizer()
    sink = _EachStep()
    with gradwatch.watch(case.model, optimizer, sinks=[sink], on_nonfinite=policy):
        for number in range(3):
            loss = case.loss(case.model, case.batch(number))
            (loss * float("nan") if number == 1 else loss).backward()
            optimizer.step()
            optimizer.zero_grad()
    first = next(batch for batch in sink.batches if batch.events)
    assert [step.step for step in first.steps] == [2]
    assert "nan" in [event.kind for event in first.events]


def test_numbers_of_a_device_come_when_they_have_arrived() -> None:
    """A step whose numbers are on their way is delivered later, in order, and once; nothing waits."""
    case, optimizer = model_and_optimizer()
    sink = _EachStep()
    with late_readings(2), gradwatch.watch(case.model, optimizer, sinks=[sink]):
        train(case, optimizer, 2)
        assert not sink.steps
        train(case, optimizer, 8)
        assert 0 < len(sink.steps) < 10
    assert [step.step for step in sink.steps] == list(range(1, 11))


def test_each_step_of_several_optimizers() -> None:
    """Two optimizers that step in turns are delivered in order, with their joint norm."""
    case, _ = model_and_optimizer()
    parameters = list(case.model.parameters())
    halves = [torch.optim.SGD(parameters[:1], 0.01), torch.optim.SGD(parameters[1:], 0.01)]
    each, together = _EachStep(), CapturingSink()
    with gradwatch.watch(case.model, halves, sinks=[each, together]):
        for number in range(4):
            case.loss(case.model, case.batch(number)).backward()
            for optimizer in halves:
                optimizer.step()
                optimizer.zero_grad()
    assert len(each.steps) == 8
    assert each.steps == together.steps


def test_a_sink_with_a_method_called_deliver_is_fine() -> None:
    """Only a word says how to deliver: a method of that name is the user's own."""

    class Own(CapturingSink):
        def deliver(self) -> None:
            raise AssertionError("nobody calls it")

    case, optimizer = model_and_optimizer()
    with gradwatch.watch(case.model, optimizer, sinks=[sink := Own()]):
        train(case, optimizer, 3)
    assert len(sink.batches) == 1

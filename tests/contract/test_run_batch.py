"""A batch that runs out of memory is run again, as if it had been split from the start."""

import traceback
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradwatch
from gradwatch.testing import late_readings
from tests.support.calls import CountCalls

from .running_out import (
    LENGTHS,
    Fault,
    Model,
    batch_of,
    closure_with_tokens,
    new_watcher,
    plain_closure,
)

OF_TIME = ["time_s", "step_time_s"]


def _train(
    fault: Fault,
    size: int | None = None,
    closure_of: Callable[[nn.Module, Fault], Any] = plain_closure,
    around: Callable[[], Any] = nullcontext,
    **options: Any,
) -> dict[str, Any]:
    """Train six batches; return everything that may tell two runs apart."""
    model, watcher = new_watcher(size, **options)
    losses = []
    with watcher:
        closure = closure_of(model, fault)
        for index in range(len(LENGTHS)):
            with around():
                losses.append(watcher.run_batch(closure, batch_of(index)))
            watcher.step()
    steps = watcher.history.steps().drop(columns=OF_TIME, errors="ignore")
    return {
        "model": {name: value.tolist() for name, value in model.state_dict().items()},
        "random": torch.get_rng_state().tolist(),
        "losses": [loss.item() for loss in losses],
        "steps": repr(steps.to_dict()),
        "parameters": repr(watcher.history.parameters().to_dict()),
        "noise": repr(watcher.noise_scale),
        "size": watcher.micro_batch_size,
    }


ALWAYS = 99


@pytest.mark.parametrize("limit", [4, 2, 1])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("example", [0, 7], ids=["first", "last"])
@pytest.mark.parametrize("place", ["forward", "backward"])
def test_a_rerun_equals_a_run_that_was_small_from_the_start(
    place: str, example: int, accumulate: int, limit: int
) -> None:
    """Bit for bit: weights, buffers, random numbers, records, losses and the noise scale."""
    fault = Fault(limit, place, example)
    found = _train(fault, accumulate=accumulate)
    assert found == _train(Fault(ALWAYS), size=limit, accumulate=accumulate)
    halved = [size for size in (8, 4, 2) if size > limit]
    assert [size for size in fault.sizes if size > limit] == (
        halved if example == 0 else [8, *(size for size in halved[1:] for _ in range(8 // size))]
    )


OPTIONS: dict[str, dict[str, Any]] = {
    "tokens": {"closure_of": closure_with_tokens},
    "clip": {"clip": 0.05},
    "skip": {"on_nonfinite": "skip", "statistics": ("norm", "max", "std", "update_ratio")},
    "auto": {"accumulate": "auto"},
    "autocast": {"around": lambda: torch.autocast("cpu", torch.bfloat16)},
}


@pytest.mark.parametrize("place", ["forward", "backward"])
@pytest.mark.parametrize("option", OPTIONS)
def test_a_rerun_leaves_no_trace_with_options(option: str, place: str) -> None:
    """The same with token weights, clipping, skipping, statistics, a policy and autocast."""
    options = {"accumulate": 3, **OPTIONS[option]}
    if option == "auto":
        options["accumulate"] = gradwatch.AccumulateByNoiseScale(min=2)
    found = _train(Fault(2, place, 7), **options)
    if option == "auto":
        options["accumulate"] = gradwatch.AccumulateByNoiseScale(min=2)
    assert found == _train(Fault(ALWAYS), size=2, **options)


@pytest.mark.parametrize("place", ["forward", "backward"])
@pytest.mark.parametrize("late", [False, True], ids=["at_hand", "late"])
def test_a_rerun_leaves_no_trace_with_a_scaler(late: bool, place: str) -> None:
    """The same with a GradScaler, also where numbers arrive late as from an accelerator."""
    with late_readings() if late else nullcontext():
        runs = [
            _train(
                fault,
                size=size,
                accumulate=3,
                closure_of=closure_with_tokens,
                scaler=torch.amp.GradScaler("cpu", 1024.0, growth_interval=1),
            )
            for fault, size in ((Fault(2, place, 7), None), (Fault(ALWAYS), 2))
        ]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_gradients_that_are_zeroed_rather_than_freed(place: str) -> None:
    """With gradients that stay around between steps a rerun leaves no trace either."""
    outcomes = []
    for fault, size in ((Fault(2, place, 7), None), (Fault(ALWAYS), 2)):
        model, watcher = new_watcher(size, accumulate=3)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with watcher:
            for index in range(3):
                watcher.run_batch(plain_closure(model, fault), batch_of(index))
            gradients = [p.grad.tolist() for p in model.parameters()]
            assert watcher.step()
        outcomes.append((gradients, watcher.last.micro_batches, watcher.last.grad_norm))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("place", ["forward", "backward"])
@pytest.mark.parametrize("failing", [0, 1])
def test_an_example_that_does_not_fit_raises_the_error(failing: int, place: str) -> None:
    """At one example the error itself is raised with its story, and the window is as before."""
    model, watcher = new_watcher(accumulate=2)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    fault, whole = Fault(0, place), Fault(ALWAYS)
    fault.check = lambda numbers, where: _raise(error) if where == place else None  # type: ignore[method-assign]
    with watcher:
        for index in range(failing):
            watcher.run_batch(plain_closure(model, whole), batch_of(index))
        before = [None if p.grad is None else p.grad.tolist() for p in model.parameters()]
        buffers, random = [b.tolist() for b in model.buffers()], torch.get_rng_state()
        with pytest.raises(torch.OutOfMemoryError) as caught:
            watcher.run_batch(plain_closure(model, fault), batch_of(1))
        assert caught.value is error
        frames = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
        assert "_raise" in frames
        assert [None if p.grad is None else p.grad.tolist() for p in model.parameters()] == before
        assert [b.tolist() for b in model.buffers()] == buffers
        assert torch.equal(torch.get_rng_state(), random)
        assert not watcher.step()
        for index in range(failing, 2):
            watcher.run_batch(plain_closure(model, whole), batch_of(index))
        assert watcher.step()
    assert watcher.last.weight == 9
    assert watcher.last.micro_batches == 9
    assert watcher.micro_batch_size == 1


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt()])
def test_other_errors_pass_through_at_once(error: BaseException) -> None:
    """An error that memory has no part in is raised from the first attempt, the window as before."""
    model, watcher = new_watcher(2, accumulate=2)
    whole, calls = Fault(ALWAYS), []

    def closure(part: dict[str, Tensor]) -> Tensor:
        calls.append(part)
        if len(calls) == 3:
            raise error
        return plain_closure(model, whole)(part)

    with watcher:
        watcher.run_batch(plain_closure(model, whole), batch_of(0))
        before = [p.grad.tolist() for p in model.parameters()]
        with pytest.raises(type(error)) as caught:
            watcher.run_batch(closure, batch_of(1))
        assert caught.value is error
        assert len(calls) == 3
        assert [p.grad.tolist() for p in model.parameters()] == before
        assert not watcher.step()
        watcher.run_batch(plain_closure(model, whole), batch_of(1))
        assert watcher.step()
    assert (watcher.last.weight, watcher.last.micro_batches) == (9, 5)
    assert watcher.micro_batch_size == 2
    assert not watcher.events


@pytest.mark.parametrize(
    ("result", "told"),
    [
        (None, "None of type NoneType"),
        (1.5, "1.5 of type float"),
        (torch.ones(3), r"a tensor of shape \[3\]"),
        ((torch.ones(3), 4), r"\(a tensor of shape \[3\], 4 of type int\)"),
        (("loss", 1), r"\('loss' of type str, 1 of type int\)"),
        ((torch.ones(()), 1, 2), r"\(a tensor of shape \[\], 1 of"),
    ],
)
def test_a_closure_must_return_its_loss(result: object, told: str) -> None:
    """Anything but a loss, or a loss and a weight, is refused and shown."""
    _, watcher = new_watcher()
    with watcher, pytest.raises(TypeError, match=rf"run_batch\(\) must return .* got {told}"):
        watcher.run_batch(lambda part: result, batch_of(0))


@pytest.mark.parametrize(("weight", "error"), [("3", TypeError), (-1.0, ValueError)])
def test_a_weight_is_checked(weight: Any, error: type[Exception]) -> None:
    """A weight is refused as watcher.backward() does, and the batch can be run again."""
    model, watcher = new_watcher()
    closure = plain_closure(model, Fault(ALWAYS))
    with watcher:
        with pytest.raises(error, match="weight"):
            watcher.run_batch(lambda part: (closure(part), weight), batch_of(0))
        watcher.run_batch(closure, batch_of(0))
        assert watcher.step()


def test_an_optimizer_must_be_named() -> None:
    """Without an optimizer the error says what to write."""
    model = Model()
    with (
        gradwatch.watch(model) as watcher,
        pytest.raises(RuntimeError, match=r"watch\(model, optimizer"),
    ):
        watcher.run_batch(plain_closure(model, Fault(ALWAYS)), batch_of(0))


def test_the_size_is_remembered() -> None:
    """It is told by an event, read from the watcher, and in its state; smaller batches run whole."""
    model, watcher = new_watcher()
    fault = Fault(4)
    with watcher:
        assert watcher.micro_batch_size is None
        for index in (1, 1, 0):
            watcher.run_batch(plain_closure(model, fault), batch_of(index))
            watcher.step()
    assert fault.sizes == [8, 4, 4, 4, 4, 1]
    assert watcher.micro_batch_size == watcher.state_dict()["micro_batch_size"] == 4
    (event,) = watcher.events
    assert (event.kind, event.step, event.value) == ("out_of_memory", 1, 4.0)
    assert "micro-batch of 8 examples" in event.message
    assert "step 1" in event.message
    assert "at most 4" in event.message
    resumed, again = Fault(4), new_watcher(watcher.state_dict()["micro_batch_size"])
    with again[1]:
        again[1].run_batch(plain_closure(again[0], resumed), batch_of(1))
    assert resumed.sizes == [4, 4]


def test_what_is_halved_is_what_has_failed() -> None:
    """Parts are of equal size: of ten examples in parts of at most eight, five failed, not eight."""
    model, watcher = new_watcher(8)
    batch = {"x": torch.randn(10, 3, 4), "numbers": torch.arange(10)}
    fault = Fault(4)
    with watcher:
        watcher.run_batch(plain_closure(model, fault), batch)
    assert fault.sizes == [5, 3, 2, 3, 2]
    assert watcher.micro_batch_size == 3
    assert "5 examples" in watcher.events[0].message


@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize("closure_of", [plain_closure, closure_with_tokens])
def test_the_loss_is_that_of_the_batch(closure_of: Any, size: int | None) -> None:
    """The weighted mean over the micro-batches, detached, also in half precision."""
    model, watcher = new_watcher(size)
    model.eval()
    with torch.no_grad():
        result = closure_of(model, Fault(ALWAYS))(batch_of(1))
    expected = result[0] if isinstance(result, tuple) else result
    with watcher:
        loss = watcher.run_batch(closure_of(model, Fault(ALWAYS)), batch_of(1))
    assert loss.shape == ()
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected)


def test_no_host_wait() -> None:
    """Where nothing fails nobody waits for the device: not for the weights, nor for the losses."""
    with late_readings():
        model, watcher = new_watcher(2, accumulate=2)
        with watcher, CountCalls() as counter:
            for index in range(4):
                watcher.run_batch(closure_with_tokens(model, Fault(ALWAYS)), batch_of(index))
                watcher.step()
    assert counter.waits == 0

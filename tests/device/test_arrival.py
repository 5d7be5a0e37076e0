"""How numbers come from a device: without a wait, on its own stream, and whatever happens to it."""

import tempfile
import warnings

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.measure import deferred
from gradwatch.record import recorder
from gradwatch.testing import CapturingSink
from tests.support import device

STAND_IN = pytest.mark.skipif(
    device.NAME not in ("fake", "mini"), reason="a real device is not told what to do"
)


def _train(steps, *, index=0, before=lambda step: None, **options):
    """Trains on a device, one watched step after the other; returns the watcher."""
    torch.manual_seed(0)
    model = device.to(nn.Linear(4, 3), index)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    data = [device.tensor(torch.randn(2, 4), device.DEVICES[index]) for _ in range(steps)]
    with gradwatch.watch(model, optimizer, **options) as watcher:
        for step, x in enumerate(data):
            before(step)
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return watcher


def _norms_on_the_cpu(steps):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    norms = []
    for x in [torch.randn(2, 4) for _ in range(steps)]:
        model(x).square().mean().backward()
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
        optimizer.step()
        optimizer.zero_grad()
    return norms


@pytest.mark.parametrize("index", range(len(device.DEVICES)))
def test_the_event_is_on_the_stream_of_the_device(index):
    """Numbers of a device that is not the current one are not read before they have arrived."""
    with device.late(5):
        watcher = _train(12, index=index)
    assert watcher.history.steps().grad_norm.tolist() == pytest.approx(_norms_on_the_cpu(12), 1e-6)


def test_a_side_stream_is_waited_for():
    """A whole step on a stream that is not the default one."""
    with device.late(5), torch.Stream(device=device.DEVICE):
        watcher = _train(12)
    assert watcher.history.steps().grad_norm.tolist() == pytest.approx(_norms_on_the_cpu(12), 1e-6)


@pytest.mark.parametrize("seconds", [recorder.FLUSH_SECONDS, 0.0])
def test_a_delivery_waits_for_nothing(monkeypatch, seconds):
    """Not the batches of 64 steps, and not those of steps that take longer than 5 seconds."""
    monkeypatch.setattr(recorder, "FLUSH_SECONDS", seconds)
    monkeypatch.setattr(recorder.SinkHub.due, "__defaults__", (seconds,))
    sink, waits = CapturingSink(), []

    def before(step):
        waits.append(counts.waits)

    with device.late(3), device.counting() as counts:
        _train(150, before=before, sinks=[sink])
    assert waits[-1] == waits[0]
    assert [record.step for record in sink.steps] == list(range(1, 151))
    assert len(sink.batches) > (30 if seconds == 0 else 2)


@STAND_IN
@pytest.mark.parametrize("options", [{}, {"clip": 1.0}, {"clip": "auto"}, {"statistics": ("std",)}])
def test_a_device_that_fails_loses_no_finished_step(options):
    """What had arrived is delivered, the folder is readable, and the error is the loop's own."""
    sink, folder = CapturingSink(), tempfile.mkdtemp()
    error = RuntimeError("CUDA error: device-side assert triggered")
    failing = device.failing(error)

    def fail(step):
        if step == 30:
            torch.accelerator.synchronize()  # what is before it has been computed
            failing.__enter__()
        if step == 31:
            raise error

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            with pytest.raises(RuntimeError, match="device-side assert"):
                _train(40, before=fail, sinks=[sink], run_dir=folder, **options)
        finally:
            failing.__exit__(None, None, None)
    assert [record.step for record in sink.steps] == list(range(1, 31))
    assert sink.closed
    assert len(gradwatch.load(folder).steps()) == 30
    assert not any("report this" in str(one.message) for one in told)


@STAND_IN
def test_numbers_that_were_there_are_read_after_a_failure():
    """Nobody had asked whether they have arrived, and nobody can ask any more."""
    numbers = deferred.Deferred(device.tensor(torch.tensor([1.0, 2.0])))
    transfer = deferred.Transfer([numbers])
    torch.accelerator.synchronize()
    with device.failing(RuntimeError("CUDA error: an illegal memory access")):
        transfer.wait()
    assert numbers.array().tolist() == [1.0, 2.0]


@STAND_IN
def test_numbers_that_were_not_there_are_an_error():
    """What the host buffer holds before the copy is never taken for numbers."""
    with device.late(5):
        transfer = deferred.Transfer([deferred.Deferred(device.tensor(torch.tensor([1.0])))])
        with (
            device.failing(RuntimeError("CUDA error: an illegal memory access")),
            pytest.raises(RuntimeError, match="illegal memory"),
        ):
            transfer.wait()


@pytest.mark.parametrize("lacking", ["record_event", "pinned_like"])
def test_a_device_without_events_is_waited_for_once_in_64_steps(monkeypatch, lacking):
    """One wait is for all copies up to then."""
    monkeypatch.setattr(deferred, lacking, lambda _: None)
    waits = []

    def before(step):
        waits.append(counts.waits)

    with device.counting() as counts:
        watcher = _train(150, before=before)
    assert waits[-1] - waits[0] == 2
    assert watcher.history.steps().grad_norm.tolist() == pytest.approx(_norms_on_the_cpu(150), 1e-6)


def _captured(capture, **options):
    """Trains 12 steps, of which ``capture`` is told which are captured into a graph."""
    inside = []

    def before(step):
        if inside:
            inside.pop().__exit__(None, None, None)
        if step in capture:
            inside.append(device.capturing())
            inside[0].__enter__()

    try:
        return _train(12, before=before, **options)
    finally:
        for one in inside:
            one.__exit__(None, None, None)


@STAND_IN
@pytest.mark.parametrize(
    "options", [{}, {"explain": True}, {"statistics": ("std",)}, {"sinks": [CapturingSink()]}]
)
def test_a_captured_step_is_left_alone(options):
    """Nothing is asked of the device, which would break the capture; it is said once."""
    with device.late(5), pytest.warns(gradwatch.GradwatchWarning, match="captured") as told:
        watcher = _captured((5, 6), **options)
    assert len(told) == 1
    assert len(watcher.history.steps()) == 10
    assert watcher.history.events()[["kind", "step"]].values.tolist() == [["changed", 6]]


@STAND_IN
@pytest.mark.parametrize(
    "options", [{"clip": 1.0}, {"on_nonfinite": "skip"}, {"skip_spikes": "auto"}]
)
def test_a_captured_step_cannot_be_acted_on(options):
    """A replay would train without the clip, so it is refused, with what to write instead."""
    with pytest.raises(NotImplementedError, match="make_graphed_callables"):
        _captured((5, 6), **options)

"""What a watcher remembers when very much happens."""

import threading

import torch

import gradwatch
from gradwatch import Event
from gradwatch.record.recorder import FIRST_EVENTS, NEWEST_EVENTS, Recorder, RingBuffer, SinkHub
from gradwatch.record.records import Layout
from gradwatch.testing import CapturingSink


def _event(step):
    return Event(step, 1, "nan", "w", "", 1.0, 0, "")


def test_the_first_events_are_never_pushed_out():
    """After many events the first and the newest are there, in order, and no more than fit."""
    recorder = Recorder(RingBuffer(Layout(("w",), ("",)), 4), SinkHub((), 4))
    for step in range(0, 20_000, 2):
        recorder.note((_event(step), _event(step + 1)))
    steps = [event.step for event in recorder.events()]
    assert len(steps) == FIRST_EVENTS + NEWEST_EVENTS
    assert steps[:FIRST_EVENTS] == list(range(FIRST_EVENTS))
    assert steps[FIRST_EVENTS:] == list(range(20_000 - NEWEST_EVENTS, 20_000))


def _step(weight, optimizer):
    weight.square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_reading_in_between_does_not_put_a_delivery_off():
    """Sinks get 64 steps at a time, whether they were written down at once or as somebody read."""
    weight = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    sink = CapturingSink()
    with gradwatch.watch({"weight": weight}, optimizer, sinks=[sink]) as watcher:
        for number in range(1, 129):
            _step(weight, optimizer)
            if number in (40, 100):
                assert watcher.last.step == number
            assert len(sink.batches) == number // 64
    assert [len(batch.steps) for batch in sink.batches] == [64, 64]


def test_another_thread_may_read_while_the_training_goes_on():
    """Every step is there once and in order, in the history and in what the sink has got."""
    weight = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1e-4)
    sink = CapturingSink()
    with gradwatch.watch({"weight": weight}, optimizer, sinks=[sink], buffer_size=512) as watcher:
        over = threading.Event()
        seen = []

        def read():
            while not over.is_set():
                seen.append(len(watcher.history))

        reader = threading.Thread(target=read)
        reader.start()
        for _ in range(500):
            _step(weight, optimizer)
        over.set()
        reader.join()
        assert watcher.history.steps().index.tolist() == list(range(1, 501))
    assert seen == sorted(seen)
    assert [record.step for record in sink.steps] == list(range(1, 501))

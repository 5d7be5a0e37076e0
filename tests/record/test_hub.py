"""The hub: batches, and sinks that fail."""

import itertools
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch import Event, GradwatchWarning, RecordBatch, StepRecord
from gradwatch.errors import warn_safely
from gradwatch.record import sink_queue
from gradwatch.record.recorder import FLUSH_STEPS, SinkHub
from gradwatch.record.records import Layout
from gradwatch.testing import CapturingSink


def _take(count, events=()):
    steps = [StepRecord(step=i) for i in range(count)]
    empty = np.zeros((count, 0))
    return RecordBatch(Layout((), ()), steps, empty, empty)


class _Full:
    def write(self, batch):
        raise OSError("No space left on device")

    def close(self):
        raise OSError("No space left on device")


class _Sometimes(CapturingSink):
    """Fails at the attempts with these numbers, counted from 1."""

    def __init__(self, *fails_at, error=OSError):
        super().__init__()
        self.fails_at, self.error = fails_at, error
        self.attempts = 0

    def write(self, batch):
        self.attempts += 1
        if self.attempts in self.fails_at:
            raise self.error("away")
        super().write(batch)


def _numbered(first):
    """A source of batches of one step each, which count on."""
    number = itertools.count(first)
    empty = np.zeros((1, 0))
    events = (Event(1, 1, "nan", "w", "", 1.0, 0, ""),) * 2
    return lambda *_: RecordBatch(
        Layout((), ()), [StepRecord(step=next(number))], empty, empty, events=events
    )


def _deliver(hub, take, times):
    for _ in range(times):
        hub.add(urgent=False)
        hub.deliver(take)


@contextmanager
def _told():
    """Collects the warnings of a block, as texts."""
    texts = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    assert all(issubclass(one.category, GradwatchWarning) for one in caught)
    texts += [str(one.message) for one in caught]


def test_delivers_in_batches():
    """A sink is called once for 64 steps, not once a step."""
    sink = CapturingSink()
    hub = SinkHub([sink], capacity=1000)
    for _ in range(3 * FLUSH_STEPS):
        if hub.add(urgent=False):
            hub.deliver(_take)
    assert [len(batch.steps) for batch in sink.batches] == [FLUSH_STEPS] * 3


def test_never_lets_more_wait_than_the_buffer_keeps():
    """A small buffer is delivered before it comes round."""
    hub = SinkHub([CapturingSink()], capacity=2)
    assert [hub.add(urgent=False) for _ in range(2)] == [False, True]


def test_a_sink_that_fails_once_misses_nothing():
    """It gets what it missed with the next delivery, oldest first; two warnings say so."""
    sink = _Sometimes(2)
    hub = SinkHub([sink], capacity=10)
    with _told() as told:
        _deliver(hub, _numbered(1), 5)
    assert [record.step for record in sink.steps] == [1, 2, 3, 4, 5]
    failed, recovered = told
    assert "_Sometimes failed in write() with OSError: away. It is tried again" in failed
    assert "works again" in recovered
    assert "Lost" not in recovered


def test_pauses_grow():
    """A sink that fails is tried at the next delivery, then 2, 4 and 8 deliveries later."""
    sink = _Sometimes(*range(1, 100))
    hub = SinkHub([sink], capacity=10)
    take, tried = _numbered(1), []
    with _told() as told:
        for number in range(1, 40):
            before = sink.attempts
            _deliver(hub, take, 1)
            if sink.attempts > before:
                tried.append(number)
    assert tried == [1, 2, 4, 8, 16, 32]
    assert len(told) == 1


def test_a_sink_that_never_recovers_is_given_up_at_the_end():
    """The second warning says how much is lost; the sink is closed, and the others got everything."""
    bad, good = _Sometimes(*range(1, 100)), CapturingSink()
    hub = SinkHub([bad, good], capacity=10)
    with _told() as told:
        _deliver(hub, _numbered(1), 20)
        hub.close()
    assert len(told) == 2
    assert "given up. Lost: steps 20, events 40." in told[1]
    assert bad.closed
    assert good.closed
    assert [record.step for record in good.steps] == list(range(1, 21))


def test_the_end_is_one_more_attempt():
    """What still waits is written before the sink is closed, whatever pause is under way."""
    sink = _Sometimes(1, 2, 3)
    hub = SinkHub([sink], capacity=10)
    with _told() as told:
        _deliver(hub, _numbered(1), 5)
        hub.close()
    assert "works again" in told[1]
    assert [record.step for record in sink.steps] == [1, 2, 3, 4, 5]
    assert sink.closed


def test_what_is_kept_is_bounded(monkeypatch):
    """Beyond the limits the oldest batches are lost, and told when the sink works again."""
    monkeypatch.setattr(sink_queue, "KEPT_STEPS", 3)
    sink = _Sometimes(*range(1, 4))
    hub = SinkHub([sink], capacity=10)
    with _told() as told:
        _deliver(hub, _numbered(1), 8)
    assert [record.step for record in sink.steps] == [5, 6, 7, 8]
    assert "up to 3 steps" in told[0]
    assert "Lost: steps 4, events 8." in told[1]


@pytest.mark.parametrize("limit", ["KEPT_EVENTS", "KEPT_NORMS"])
def test_the_newest_batch_is_always_kept(monkeypatch, limit):
    """A batch that is larger than a limit is not lost before the sink was tried again."""
    monkeypatch.setattr(sink_queue, limit, -1)
    sink = _Sometimes(1)
    hub = SinkHub([sink], capacity=10)
    with _told() as told:
        _deliver(hub, _numbered(1), 1)
        hub.close()
    assert "works again" in told[1]
    assert "Lost" not in told[1]
    assert [record.step for record in sink.steps] == [1]


def test_a_sink_that_fails_now_and_then_is_told_once():
    """Of the later failures nothing is told, as they cost nothing."""
    sink = _Sometimes(*range(1, 60, 2))
    hub = SinkHub([sink], capacity=10)
    with _told() as told:
        _deliver(hub, _numbered(1), 40)
        hub.close()
    assert len(told) == 2
    assert [record.step for record in sink.steps] == list(range(1, 41))


def test_a_later_failure_is_told_when_it_costs_records(monkeypatch):
    """A sink that worked again after its first failure, and then fails for good."""
    monkeypatch.setattr(sink_queue, "KEPT_STEPS", 3)
    sink = _Sometimes(1, *range(4, 100))
    hub = SinkHub([sink], capacity=10)
    with _told() as told:
        _deliver(hub, _numbered(1), 20)
        hub.close()
    assert ["works again" in text for text in told] == [False, True, False, False]
    assert "oldest records are lost from now on" in told[2]
    assert "Lost: steps 18" in told[3]


def test_an_interrupt_in_a_sink_loses_nothing():
    """Ctrl+C while a sink writes gets through; the end writes that batch, and to the sinks after it."""
    first, second = _Sometimes(2, error=KeyboardInterrupt), CapturingSink()
    hub = SinkHub([first, second], capacity=10)
    take = _numbered(1)
    _deliver(hub, take, 1)
    with pytest.raises(KeyboardInterrupt):
        _deliver(hub, take, 1)
    hub.close()
    assert [record.step for record in first.steps] == [1, 2]
    assert [record.step for record in second.steps] == [1, 2]


def test_an_interrupt_at_the_end_leaves_no_sink_open():
    """Ctrl+C during the last attempt of one sink gets through when all of them are closed."""
    first, second = _Sometimes(1, 2, error=KeyboardInterrupt), CapturingSink()
    hub = SinkHub([first, second], capacity=10)
    with pytest.raises(KeyboardInterrupt):
        _deliver(hub, _numbered(1), 1)
    with pytest.raises(KeyboardInterrupt):
        hub.close()
    assert first.closed
    assert second.closed
    assert [record.step for record in second.steps] == [1]


def test_sinks_are_never_compared():
    """A sink whose == raises, such as an array or a tensor would, fails and recovers as any other."""

    class Touchy(_Sometimes):
        __hash__ = None

        def __eq__(self, other):
            raise TypeError("no comparing")

    bad, good = Touchy(1), Touchy()
    hub = SinkHub([good, bad], capacity=10)
    with _told() as told:
        _deliver(hub, _numbered(1), 2)
    hub.close()
    assert "works again" in told[1]
    assert len(bad.steps) == len(good.steps) == 2
    assert bad.closed
    assert good.closed


def test_an_error_without_a_text_is_told_by_its_class():
    """An error whose str() raises stops nothing."""

    class Mute(Exception):
        def __str__(self):
            raise RuntimeError

    hub = SinkHub([_Sometimes(1, error=Mute)], capacity=10)
    with _told() as told:
        _deliver(hub, _numbered(1), 1)
    assert "failed in write() with Mute. It" in told[0]


def test_a_sink_that_is_given_up_is_not_reported_again():
    """Its close() fails as its write() did: that is told once, and the next sink is closed."""
    good = CapturingSink()
    hub = SinkHub([_Full(), good], capacity=10)
    with _told() as told:
        _deliver(hub, _numbered(1), 1)
        hub.close()
    assert len(told) == 2
    assert "given up" in told[1]
    assert good.closed


def test_a_sink_that_cannot_close_is_reported():
    """Closing goes on with the next sink."""
    good = CapturingSink()
    hub = SinkHub([_Full(), good], capacity=10)
    with _told() as told:
        hub.close()
    assert "_Full failed in close() with OSError: No space left" in told[0]
    assert good.closed


def test_a_warning_never_stops_the_training(caplog):
    """Where filters turn warnings into errors the report goes to the log."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_safely("a sink failed")
    assert "a sink failed" in caplog.text


class _EachStep(CapturingSink):
    deliver = "step"


class _Buffer:
    """Steps as a buffer keeps them: of the newest ones, as many as are asked for."""

    def __init__(self):
        self.steps = []

    def take(self, count, events=()):
        empty = np.zeros((count, 0))
        newest = self.steps[len(self.steps) - count :]
        return RecordBatch(Layout((), ()), newest, empty, empty, events=events)


def test_a_sink_may_have_each_step_by_itself():
    """Beside a sink that gets 64 at once, one with `deliver = "step"` gets each when it is recorded."""
    each, together, source = _EachStep(), CapturingSink(), _Buffer()
    hub = SinkHub([together, each], capacity=1000)
    for number in range(1, FLUSH_STEPS + 3):
        source.steps.append(StepRecord(step=number))
        assert hub.add(urgent=False)
        hub.deliver_due(source.take, urgent=False)
        assert len(each.steps) == number
    assert [len(batch.steps) for batch in together.batches] == [FLUSH_STEPS]
    hub.deliver(source.take)
    assert each.steps == together.steps == source.steps


@given(st.lists(st.sampled_from(["step", "event", "flush"]), max_size=200))
def test_every_sink_gets_everything_once(calls):
    """Whatever the order of steps, events and flushes, and however a sink is delivered to."""
    each, together, source = _EachStep(), CapturingSink(), _Buffer()
    hub = SinkHub([each, together], capacity=8)
    events = []
    for number, call in enumerate(calls):
        if call == "event":
            events.append(Event(number, 1, "nan", "w", "", 1.0, 0, ""))
            hub.note(events[-1:])
        elif call == "step":
            source.steps.append(StepRecord(step=number))
            if hub.add(urgent=False):
                hub.deliver_due(source.take, urgent=False)
        else:
            hub.deliver(source.take)
    hub.deliver(source.take)
    for sink in (each, together):
        assert sink.steps == source.steps
        assert list(sink.events) == events


def test_many_single_steps_wait_for_a_sink_that_fails():
    """Thousands of batches of one step are kept, the oldest are lost, and their number is told."""
    bad, source = _Sometimes(*range(1, 100)), _Buffer()
    bad.deliver = "step"
    hub = SinkHub([bad], capacity=10)
    with _told() as told:
        for number in range(1, 5_001):
            source.steps.append(StepRecord(step=number))
            hub.add(urgent=False)
            hub.deliver_due(source.take, urgent=False)
        hub.close()
    assert "Lost: steps 5,000, events 0." in told[-1]
    assert len(told) == 2

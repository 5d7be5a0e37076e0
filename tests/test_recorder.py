"""What a watcher remembers when very much happens."""

from gradwatch import Event
from gradwatch.record.batch import Layout
from gradwatch.record.buffer import RingBuffer
from gradwatch.record.hub import SinkHub
from gradwatch.recorder import FIRST_EVENTS, NEWEST_EVENTS, Recorder


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

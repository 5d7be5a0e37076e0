"""The hub: batches, and sinks that fail."""

import warnings

import numpy as np
import pytest

from gradwatch import GradwatchWarning, RecordBatch, StepRecord
from gradwatch.errors import warn_safely
from gradwatch.record.recorder import FLUSH_STEPS, SinkHub
from gradwatch.record.records import Layout
from gradwatch.testing import CapturingSink


def _take(count):
    steps = [StepRecord(step=i) for i in range(count)]
    empty = np.zeros((count, 0))
    return RecordBatch(Layout((), ()), steps, empty, empty)


class _Full:
    def write(self, batch):
        raise OSError("No space left on device")

    def close(self):
        raise OSError("No space left on device")


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


def test_a_failing_sink_is_reported_once_and_left_out():
    """The other sinks go on, and close does not warn a second time."""
    good = CapturingSink()
    hub = SinkHub([_Full(), good], capacity=10)
    hub.add(urgent=False)
    with pytest.warns(GradwatchWarning, match="_Full failed in write.*No space left") as caught:
        hub.deliver(_take)
    assert len(caught) == 1
    hub.add(urgent=False)
    hub.deliver(_take)
    hub.close()
    assert len(good.steps) == 2
    assert good.closed


def test_a_sink_that_cannot_close_is_reported():
    """Closing goes on with the next sink."""
    good = CapturingSink()
    hub = SinkHub([_Full(), good], capacity=10)
    with pytest.warns(GradwatchWarning, match=r"failed in close\(\)"):
        hub.close()
    assert good.closed


def test_a_warning_never_stops_the_training(caplog):
    """Where filters turn warnings into errors the report goes to the log."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_safely("a sink failed")
    assert "a sink failed" in caplog.text

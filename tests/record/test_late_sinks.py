"""Sinks that are made with the first step."""

import pytest

from gradwatch.errors import GradwatchWarning
from gradwatch.record.late_sinks import LateSinks
from gradwatch.testing import CapturingSink
from tests.record.folder.runs import batch, event


class Broken(CapturingSink):
    """A sink that fails once."""

    failures = 1

    def write(self, batch):
        """Fail, then work."""
        if self.failures:
            self.failures -= 1
            raise OSError("no")
        super().write(batch)


def test_no_sink_is_made_before_the_first_step():
    """Nor at the end of a model that never steps."""
    made = []
    late = LateSinks(lambda: made.append(1) or [])
    late.write(batch([], events=[event(1)]))
    late.close()
    assert made == []


def test_events_before_the_first_step_come_with_it():
    """Once, before those of the step."""
    sink = CapturingSink()
    late = LateSinks(lambda: [sink])
    for value in (1.0, 2.0):
        late.write(batch([], events=[event(1, value=value)]))
    late.write(batch([1, 2], events=[event(2, value=3.0)]))
    late.write(batch([3]))
    late.close()
    assert [record.step for record in sink.steps] == [1, 2, 3]
    assert [one.value for one in sink.events] == [1.0, 2.0, 3.0]
    assert sink.closed


def test_a_first_step_that_raised_is_one():
    """It comes without a record of the step."""
    sink = CapturingSink()
    late = LateSinks(lambda: [sink])
    late.write(batch([], events=[event(1)]))
    late.begin()
    late.write(batch([], events=[event(2)]))
    late.close()
    assert [one.step for one in sink.events] == [1, 2]


def test_a_sink_that_fails_keeps_the_others_from_nothing():
    """It is named in the warning, and tried again."""
    sink, broken = CapturingSink(), Broken()
    late = LateSinks(lambda: [broken, sink])
    with pytest.warns(GradwatchWarning, match="Broken failed in write"):
        late.write(batch([1]))
    assert [record.step for record in sink.steps] == [1]
    with pytest.warns(GradwatchWarning, match="Broken works again"):
        late.write(batch([2]))
    late.close()
    assert [record.step for record in broken.steps] == [1, 2]


def test_sinks_that_cannot_be_made_yet_lose_nothing():
    """The batch is passed again, and the early events have not been forgotten."""
    sink, errors = CapturingSink(), [OSError("no disk")]

    def make():
        if errors:
            raise errors.pop()
        return [sink]

    late, first = LateSinks(make), batch([1])
    late.write(batch([], events=[event(1)]))
    with pytest.raises(OSError, match="no disk"):
        late.write(first)
    late.write(first)
    late.close()
    assert (len(sink.steps), len(sink.events)) == (1, 1)


def test_steps_come_one_by_one_if_a_sink_wants_that():
    """From the first step on, which has the sinks made, they come as the sinks say."""

    class EachStep(CapturingSink):
        deliver = "step"

    for sinks, wanted in (([CapturingSink()], "batch"), ([CapturingSink(), EachStep()], "step")):
        late = LateSinks(lambda sinks=sinks: sinks)
        assert late.deliver == "batch"
        late.begin()
        assert late.deliver == "step"
        late.write(batch([1]))
        assert late.deliver == wanted

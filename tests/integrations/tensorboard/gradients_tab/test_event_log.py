"""EventLog: every field of every event, up to 10,000; then how many were left out."""

import dataclasses
import math

from gradwatch.adapters import EVENT_KINDS
from gradwatch_dashboard.wire import Tag
from gradwatch_tensorboard import TensorBoardWriter

from . import logs


def write_events(folder, *groups, close=True):
    """Writes a step for each group of events."""
    writer = TensorBoardWriter(folder, step_scalars=False)
    for step, events in enumerate(groups, 1):
        writer.write(logs.batch([step], [[1.0]], events=events))
    if close:
        writer.close()
    else:
        writer._file.flush()


def test_every_field(load, tmp_path):
    """What comes back is what the record says, a NaN value too."""
    events = [
        logs.event(1, kind="exploding", value=math.inf, micro_batch=0, rank=3),
        logs.event(1, kind="skipped", value=math.nan, parameter="", optimizer="Adam/1"),
    ]
    write_events(tmp_path / "run", events, [logs.event(2)])
    found = logs.events(load(tmp_path / "run"))
    looks = [
        {"color": kind.color, "shape": kind.shape}
        for kind in map(EVENT_KINDS.get, ("exploding", "skipped", "nan"))
    ]
    written = map(dataclasses.asdict, (*events, logs.event(2)))
    expected = [event | look for event, look in zip(written, looks, strict=True)]
    assert repr(found) == repr(expected)


def test_an_event_without_a_step(load, tmp_path):
    """An event that comes in a batch of no steps is listed."""
    folder = tmp_path / "run"
    empty = logs.batch(
        [], logs.rows([], 2), events=[logs.event(4, kind="accumulate", optimizer="none")]
    )
    logs.write(folder, empty)
    tensors = load(folder)
    assert [entry["kind"] for entry in logs.events(tensors)] == ["accumulate"]
    assert logs.streams(tensors) == []


def test_ten_thousand_events_and_one_that_counts_the_rest(load, tmp_path):
    """The first 10,000 as they were, one that says there are more, and at the end how many."""
    folder = tmp_path / "run"
    many = [logs.event(1, micro_batch=i) for i in range(9_999)]
    more = [logs.event(2, kind="spike"), logs.event(2, kind="nan"), logs.event(2, kind="skipped")]
    write_events(folder, many, more, [logs.event(3)] * 5)
    found = logs.events(load(folder))
    assert [entry["micro_batch"] for entry in found[:9_999]] == list(range(9_999))
    assert [entry["kind"] for entry in found[9_999:]] == ["spike", "left_out", "left_out"]
    assert found[-1]["value"] == 7
    assert found[-1]["message"] == "7 more events are not listed: 6 nan, 1 skipped."
    assert found[-1]["step"] == found[-1]["global_step"] == 3
    assert found[-1]["parameter"] == ""
    assert found[-2]["message"] == "More events followed; only the first 10,000 are listed."


def test_a_killed_process_has_said_that_there_are_more(load, tmp_path):
    """The entry is written with the first event that is left out, not at the end only."""
    folder = tmp_path / "run"
    write_events(folder, [logs.event(1)] * 10_001, close=False)
    found = logs.events(load(folder))
    assert len(found) == 10_001
    assert found[-1]["kind"] == "left_out"


def test_exactly_ten_thousand_leave_nothing_out(load, tmp_path):
    """The last entry is the last event."""
    folder = tmp_path / "run"
    write_events(folder, [logs.event(1)] * 10_000)
    tensors = load(folder)
    assert {entry["kind"] for entry in logs.events(tensors)} == {"nan"}
    assert [tag.kind for tag in tensors if tag.kind == "events"] == ["events"]


def test_they_have_no_numbers_in_their_tag():
    """There is one series of events in a session, whatever its streams."""
    assert str(Tag("events", "0198")) == "gradwatch/events/0198"

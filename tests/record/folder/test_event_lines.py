"""A line of events: what was written comes back, and what is something else is no event."""

import json
import math

import pytest

from gradwatch.history import load
from gradwatch.record.folder.event_log import LoggedEvent, event_in, lines_of

from . import runs

LINE = json.loads(lines_of([LoggedEvent(runs.event(3), 7)]))


@pytest.mark.parametrize("value", [1.0, 0, math.inf, -math.inf, math.nan, 1e308])
def test_a_line_comes_back(value):
    """Also where its value is one that JSON does not have."""
    noted = LoggedEvent(runs.event(3, value=value), 7)
    (line,) = lines_of([noted]).splitlines()
    assert repr(event_in(line)) == repr(noted)


@pytest.mark.parametrize("name", sorted(LINE))
@pytest.mark.parametrize("value", ["gone", {}, [1], True, 1.5, None, "1"])
def test_a_field_that_is_something_else_makes_it_no_event(name, value):
    """A field that is missing or of another type is no event, so that no reader meets one."""
    line = LINE | {name: value}
    if value == "gone":
        del line[name]
    kept = event_in(json.dumps(line).encode())
    texts = ("kind", "parameter", "module", "message", "optimizer")
    fits = (name in texts and value == "1") or (name == "value" and value == 1.5)
    assert (kept is not None) == fits


@pytest.mark.parametrize(
    "line", [b"", b"\xff", b"[]", b"5", b"null", b'"x"', b"{", b"[" * 100_000, b"\x00" * 10]
)
def test_what_is_no_object_is_no_event(line):
    """Whatever bytes a line has, it is an event or none."""
    assert event_in(line) is None


def test_bad_lines_hide_no_good_ones(tmp_path):
    """Events before and behind them are read."""
    runs.write(tmp_path, runs.batch([1, 2], events=[runs.event(1), runs.event(2)]))
    path = tmp_path / "events/0001.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"{\n[]\n" + first + b"[" * 100_000 + b'\n{"step": 1}\n' + second + b"\x00")
    assert load(tmp_path).events()["step"].tolist() == [1, 2]

"""Sessions: names that rise, whatever the clock does."""

import os
import time

from gradwatch_tensorboard import matrix
from gradwatch_tensorboard.matrix import new_session


def test_names_rise_within_a_millisecond(tmp_path):
    """Many in a row are all different, in the order in which they were asked for."""
    names = [new_session(str(tmp_path)) for _ in range(1000)]
    assert names == sorted(set(names))
    assert {len(name) for name in names} == {12}


def test_a_name_is_the_time(tmp_path, monkeypatch):
    """Milliseconds since 1970, in 12 hexadecimal digits."""
    monkeypatch.setattr(matrix, "_newest_session", [0])
    before = time.time() * 1000 - 1
    assert before <= int(new_session(str(tmp_path)), 16) <= time.time() * 1000
    monkeypatch.setattr(matrix.time, "time", lambda: 1.5)
    assert new_session(str(tmp_path / "nothing")) > "000000000000"


def test_another_process_in_the_same_millisecond(tmp_path, monkeypatch):
    """The file that it has begun tells that it was there."""
    monkeypatch.setattr(matrix.time, "time", lambda: 1_700_000_000.0)
    monkeypatch.setattr(matrix, "_newest_session", [0])
    first = new_session(str(tmp_path))
    file = tmp_path / "events.out.tfevents.1700000000.host.1.0.gradwatch"
    file.touch()
    os.utime(file, (1_700_000_000, 1_700_000_000))
    monkeypatch.setattr(matrix, "_newest_session", [0])
    assert new_session(str(tmp_path)) > first


def test_a_clock_that_was_set_back(tmp_path, monkeypatch):
    """A run that is resumed on a machine whose clock is behind comes after what it resumes."""
    (tmp_path / "events.out.tfevents.1.host.1.0").touch()
    earlier = f"{int(time.time() * 1000) - 10:012x}"
    monkeypatch.setattr(matrix, "_newest_session", [0])
    monkeypatch.setattr(matrix.time, "time", lambda: 1_000.0)
    assert new_session(str(tmp_path)) > earlier


def test_an_address_is_not_looked_into(monkeypatch):
    """Of a folder elsewhere only the clock is asked."""
    monkeypatch.setattr(matrix, "_newest_session", [0])
    assert int(new_session("gs://bucket/run"), 16) <= time.time() * 1000

"""A folder can be read while it is written, by this process and by others."""

import threading

import pytest

from gradwatch.history import load
from gradwatch.record.folder import parts

from . import runs

READER = """
import sys, time, runs
from gradwatch.history import load
path, last = sys.argv[1], int(sys.argv[2])
while True:
    try:
        seen = load(path)
        break
    except (FileNotFoundError, ValueError) as error:
        begun = ("no meta.json", "There is no folder", "half", "holds no step yet")
        assert any(text in str(error) for text in begun), error
steps = 0
while steps < last:
    now = runs.assert_consistent(path)
    assert now >= steps, (now, steps)
    events = seen.events()
    assert (events["step"].diff().dropna() == 1).all()
    if now > steps:
        print(now, flush=True)
    steps = now
"""


@pytest.mark.slow
def test_reading_from_another_process(tmp_path, monkeypatch):
    """A reader sees whole prefixes of the run only, each at least as long as the last one."""
    monkeypatch.setattr(parts, "FULL", 300)
    monkeypatch.setattr(parts, "LEVELS", (9, 30, 300))
    path, steps = tmp_path / "run", 600
    reader = runs.child(READER, path, steps)
    try:
        sink = runs.write(path, close=False)
        for step in range(1, steps + 1):
            sink.write(runs.batch([step], events=[runs.event(step)]))
            if step % 100 == 0:
                _wait_until_read(reader, step)
        sink.close()
        _, error = reader.communicate()
    finally:
        reader.kill()
        reader.communicate()
    assert reader.returncode == 0, error


def _wait_until_read(reader, step):
    """Lets the reader catch up: else all might be written before it has imported torch."""
    while line := reader.stdout.readline():
        if int(line) >= step:
            return
    pytest.fail(f"The reader has ended: {reader.stderr.read()}")


def test_an_open_history_sees_what_comes(tmp_path):
    """Each call of the same History reads what is there now."""
    sink = runs.write(tmp_path, runs.batch([1, 2]), close=False)
    history = load(tmp_path)
    assert len(history) == 2
    sink.write(runs.batch([3], events=[runs.event(3)]))
    assert len(history) == 3
    assert history.steps(start=3).index.tolist() == [3]
    assert history.events()["step"].tolist() == [3]
    sink.close()
    assert history.parameters("b")["grad_norm"].tolist() == [1001.0, 1002.0, 1003.0]


def test_two_readers_in_threads(tmp_path):
    """Histories of one folder share nothing."""
    runs.write(tmp_path, runs.batch(range(1, 50)))
    failures = []

    def read():
        try:
            for _ in range(20):
                runs.assert_consistent(tmp_path, 49)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures

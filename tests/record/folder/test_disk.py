"""A disk that is full, read-only or gone: one warning, and the training goes on."""

import contextlib
import itertools
import os
import resource
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import gradwatch
from gradwatch.history import load
from gradwatch.record.folder import parts, writer
from gradwatch.record.folder.writer import RunFolder

from . import runs

UNPRIVILEGED = 65534


@pytest.fixture
def _no_patience(monkeypatch):
    """Each delivery tries the disk again, however short ago it failed."""
    monkeypatch.setattr(writer, "RETRY_S", 0.0)


@pytest.fixture
def full_disk():
    """Makes files fail beyond a size, as a full disk does; call it with the size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _write_all(sink, batches):
    for one in batches:
        sink.write(one)


def _write_to_full_disk(full_disk, room, sink, batches):
    full_disk(room)
    try:
        _write_all(sink, batches)
    finally:
        full_disk(resource.RLIM_INFINITY)


@pytest.mark.usefixtures("_no_patience")
@pytest.mark.parametrize("room", [0, 100, 3000])
def test_a_full_disk_is_one_warning_and_made_up_for_later(tmp_path, full_disk, room):
    """What did not fit is held, and is written when there is room again, each step once."""
    sink = runs.write(tmp_path, runs.batch([1, 2], events=[runs.event(1)]), close=False)
    more = [runs.batch([step], events=[runs.event(step)]) for step in range(3, 9)]
    with pytest.warns(gradwatch.GradwatchWarning, match="cannot write to the run folder") as caught:
        _write_to_full_disk(full_disk, room, sink, more)
    assert len(caught) == 1
    assert runs.steps_of(tmp_path) == [1, 2]
    assert load(tmp_path).events()["step"].tolist() == [1]
    sink.write(runs.batch([9]))
    assert runs.assert_consistent(tmp_path) == 9
    assert load(tmp_path).events()["step"].tolist() == [1, *range(3, 9)]
    sink.close()
    assert runs.assert_consistent(tmp_path) == 9
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.usefixtures("_no_patience")
def test_a_disk_that_is_full_from_the_start(tmp_path, full_disk):
    """Nothing can be written, not even meta.json: the folder is begun when there is room."""
    full_disk(0)
    with pytest.warns(gradwatch.GradwatchWarning) as caught:
        sink = runs.write(tmp_path / "run", runs.batch([1]), runs.batch([2]), close=False)
    full_disk(resource.RLIM_INFINITY)
    assert len(caught) == 1
    sink.close()
    assert runs.assert_consistent(tmp_path / "run") == 2
    assert [path.name for path in (tmp_path / "run/events").iterdir()] == ["0001.jsonl"]


def test_a_full_disk_is_not_tried_at_every_delivery(tmp_path, full_disk, monkeypatch):
    """For half a minute the training does not wait for a disk that has just failed."""
    sink = runs.write(tmp_path, runs.batch([1]), close=False)
    with pytest.warns(gradwatch.GradwatchWarning):
        _write_to_full_disk(full_disk, 0, sink, [runs.batch([2])])
    sink.write(runs.batch([3]))
    assert runs.steps_of(tmp_path) == [1]
    now = writer.time.monotonic()
    monkeypatch.setattr(writer.time, "monotonic", lambda: now + 31)
    sink.write(runs.batch([4]))
    assert runs.steps_of(tmp_path) == [1, 2, 3, 4]


def test_what_is_held_is_bounded(tmp_path):
    """Of more than 64 deliveries the oldest are lost, not the memory of the training."""
    sink = runs.write(tmp_path, runs.batch([1]), close=False)
    shutil.move(tmp_path / "steps", tmp_path / "away")
    with pytest.warns(gradwatch.GradwatchWarning):
        _write_all(sink, (runs.batch([step]) for step in range(2, 102)))
    shutil.move(tmp_path / "away", tmp_path / "steps")
    with pytest.warns(gradwatch.GradwatchWarning, match="Lost: steps 36, events 0"):
        sink.close()
    assert runs.steps_of(tmp_path) == [1, *range(38, 102)]


@pytest.mark.usefixtures("_no_patience")
@pytest.mark.parametrize("stuck", [False, True])
@pytest.mark.parametrize("error", [OSError, MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("call", range(6))
def test_a_batch_that_is_passed_again_stands_once(tmp_path, monkeypatch, error, call, stuck):
    """Wherever a write fails, and even if what it left cannot be removed, the retry leaves each step once."""
    sink = runs.write(tmp_path, runs.batch([1]), close=False)
    calls = itertools.count()

    def failing(module, name):
        whole = getattr(module, name)

        def act(*args, **options):
            result = whole(*args, **options)  # it fails only when its work is done
            if next(calls) == call:
                raise error("away")
            return result

        monkeypatch.setattr(module, name, act)

    failing(parts, "write_whole")
    failing(parts, "sync_folder")
    failing(os, "fsync")
    if stuck:
        monkeypatch.setattr(parts, "remove_quietly", lambda path: None)
    batch = runs.batch([2], events=[runs.event(2)])
    with warnings.catch_warnings(), contextlib.suppress(error):
        warnings.simplefilter("ignore")
        sink.write(batch)
    monkeypatch.undo()
    sink.write(batch)
    sink.write(runs.batch([3]))
    sink.close()
    assert runs.assert_consistent(tmp_path) == 3
    assert load(tmp_path).events()["step"].tolist() == [2]


def test_a_sink_of_a_watcher_writes_each_step_once_after_any_error(tmp_path, monkeypatch):
    """An error that is none of the disk's reaches the watcher, which passes the batch again."""
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    whole, calls = parts.write_whole, itertools.count()

    def failing(*args, **options):
        if next(calls) in (2, 3):
            raise ValueError("no such column")
        return whole(*args, **options)

    monkeypatch.setattr(parts, "write_whole", failing)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with gradwatch.watch(model, optimizer, run_dir=tmp_path) as watcher:
            for _ in range(6):
                model(torch.randn(3, 4)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                watcher.flush()
    assert "failed in write() with ValueError: no such column" in str(caught[0].message)
    assert "works again" in str(caught[1].message)
    assert len(caught) == 2
    assert runs.steps_of(tmp_path) == [1, 2, 3, 4, 5, 6]


def _weights(sinks):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    with gradwatch.watch(model, optimizer, clip=0.1, sinks=sinks) as watcher:
        for _ in range(6):
            model(torch.randn(3, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            watcher.flush()
            for sink in sinks:
                shutil.rmtree(sink.path, ignore_errors=True)
    assert list(watcher.history.steps().index) == [1, 2, 3, 4, 5, 6]
    return torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()


def test_a_deleted_folder_leaves_the_training_alone(tmp_path):
    """Deleted under the training: told at once and at the end, the same weights, and it stays deleted."""
    undisturbed = _weights([])
    with pytest.warns(gradwatch.GradwatchWarning, match="run folder") as caught:
        weights = _weights([RunFolder(tmp_path / "run")])
    assert len(caught) == 2
    assert "No such file" in str(caught[0].message)
    assert "Lost: steps 5, events 0." in str(caught[1].message)
    assert np.array_equal(weights, undisturbed)
    assert not (tmp_path / "run").exists()


def test_warnings_as_errors_do_not_stop_the_training(tmp_path, caplog):
    """Where filters turn the warning into an error it goes to the log."""
    sink = runs.write(tmp_path, runs.batch([1]), close=False)
    shutil.rmtree(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sink.write(runs.batch([2]))
        sink.close()
    assert "cannot write to the run folder" in caplog.text


READ_ONLY = """
import os, sys, tempfile, warnings, runs
with tempfile.TemporaryDirectory() as elsewhere:
    runs.write(elsewhere, runs.batch([1]))  # what is imported when used may lie out of reach below
if os.getuid() == 0:
    os.setuid(int(sys.argv[2]))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    sink = runs.RunFolder(sys.argv[1])
    for step in range(1, 4):
        sink.write(runs.batch([step]))
    sink.close()
print(len(caught), *(one.message for one in caught))
"""


@pytest.fixture
def read_only():
    """A folder that nobody may write to, where every user may go: TMPDIR may be one user's own."""
    with tempfile.TemporaryDirectory(dir="/tmp" if os.getuid() == 0 else None) as folder:
        Path(folder).chmod(0o555)
        yield Path(folder)
        Path(folder).chmod(0o755)


@pytest.mark.parametrize("inside", ["", "new/run"])
def test_a_read_only_folder_is_told(read_only, inside):
    """Neither a folder that cannot be made nor one that cannot be written to stops anything."""
    process = runs.child(READ_ONLY, read_only / inside, UNPRIVILEGED)
    output, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    assert output.startswith("2 gradwatch cannot write to the run folder")
    assert "Permission denied" in output
    assert "Lost: steps 3, events 0." in output
    assert list(read_only.iterdir()) == []


def test_a_damaged_older_part_stops_only_the_tidying(tmp_path):
    """A run that was resumed beside a damaged file is recorded, after one warning."""
    runs.write(tmp_path, runs.batch([1, 2]))
    (path,) = (tmp_path / "parameters").iterdir()
    path.write_bytes(b"PAR1 nothing PAR1")
    sink = RunFolder(tmp_path)
    with pytest.warns(gradwatch.GradwatchWarning, match="cannot merge.*is damaged") as caught:
        _write_all(sink, [runs.batch([step]) for step in (2, 3, 4)])
    sink.close()
    assert len(caught) == 1
    assert runs.steps_of(tmp_path) == [1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"parameters/0001.*is damaged: .*delete it"):
        load(tmp_path).parameters()


def _open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_descriptors_are_given_back(tmp_path):
    """Neither writing nor reading leaves files open."""
    sink, before = runs.write(tmp_path, runs.batch([1]), close=False), _open_files()
    for step in range(2, 60):
        sink.write(runs.batch([step], events=[runs.event(step)]))
        load(tmp_path).parameters("a")
    assert _open_files() <= before + 1

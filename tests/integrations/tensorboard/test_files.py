"""Files: whose they are, what is refused, and what a failing disk does."""

import contextlib
import itertools
import re
import shutil
import threading
import warnings

import pytest
import torch
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from torch.utils.tensorboard import SummaryWriter

from gradwatch import GradwatchWarning, watch
from gradwatch_tensorboard import TensorBoardWriter
from tests.support import processes


def test_path_makes_one_file(run, read, tmp_path):
    """A folder that does not exist is made; it holds one file, which close() leaves complete."""
    folder = tmp_path / "a" / "b"
    writer = TensorBoardWriter(str(folder))
    assert writer.log_dir == str(folder)
    writer.write(run.batch(range(1, 4)))
    writer.close()
    assert len(list(folder.iterdir())) == 1
    assert read(folder).steps("gradwatch/grad_norm") == [1, 2, 3]


def test_nothing_written_leaves_no_file(tmp_path):
    """A process that takes no steps leaves no empty file for TensorBoard to follow."""
    TensorBoardWriter(tmp_path).close()
    assert list(tmp_path.iterdir()) == []


def test_close_ends_the_thread(run, tmp_path):
    """No thread of a closed writer is left."""
    before = threading.active_count()
    writer = TensorBoardWriter(tmp_path)
    writer.write(run.batch(range(1, 4)))
    assert threading.active_count() == before + 1
    writer.close()
    assert threading.active_count() == before


def test_close_twice(run, tmp_path):
    """The second close does nothing."""
    writer = TensorBoardWriter(tmp_path)
    writer.write(run.batch(range(1, 4)))
    writer.close()
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    writer.close()
    assert {path.name: path.stat().st_size for path in tmp_path.iterdir()} == sizes


def test_shared_writer_stays_open(run, read, tmp_path):
    """With the user's writer there is one file and one run, and the user goes on writing to it."""
    with SummaryWriter(tmp_path) as summary_writer:
        summary_writer.add_scalar("loss", 3.0, 1)
        writer = TensorBoardWriter(summary_writer)
        writer.write(run.batch(range(1, 4)))
        writer.close()
        assert writer.log_dir == str(tmp_path)
        assert read(tmp_path).steps("gradwatch/grad_norm") == [1, 2, 3]
        summary_writer.add_scalar("loss", 2.0, 2)
    assert read(tmp_path).steps("loss") == [1, 2]
    assert len(read(tmp_path).files) == 1


def test_nonfinite_steps_reach_the_disk_at_once(run, read, tmp_path):
    """A NaN can be read before anything is closed, and before the next flush is due."""
    summary_writer = SummaryWriter(tmp_path, flush_secs=3600)
    writer = TensorBoardWriter(summary_writer)
    writer.write(run.nan_step(5))
    assert read(tmp_path).steps("gradwatch/nonfinite_event") == [5]
    summary_writer.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_deleted_folder_raises(run, tmp_path):
    """A folder that is gone is an error out of write(), so that the watcher can report it."""
    folder = tmp_path / "run"
    before = threading.active_count()
    writer = TensorBoardWriter(folder)
    writer.write(run.nan_step(1))
    shutil.rmtree(folder)
    batch = run.nan_step(2)
    with pytest.warns(GradwatchWarning, match="may be missing"), pytest.raises(FileNotFoundError):
        writer.write(batch)
    with pytest.raises(FileNotFoundError):
        writer.write(batch)  # as the watcher does
    with contextlib.suppress(FileNotFoundError):  # if the thread failed before all was queued
        writer.close()
    assert threading.active_count() == before
    assert not folder.exists()


@pytest.mark.parametrize("call", range(6))
def test_a_batch_that_is_passed_again_stands_once(run, read, tmp_path, monkeypatch, age, call):
    """A write that fails at any value goes on there, in a new file; no value is missing or there twice."""
    batches = [run.batch(range(1, 5)), run.batch(range(5, 9), [run.event(6)])]
    writer = TensorBoardWriter(tmp_path / "failing")
    writer.write(batches[0])
    whole, calls = EventFileWriter.add_event, itertools.count()

    def failing(self, event):
        if next(calls) == call:
            raise OSError("No space left on device")
        whole(self, event)

    monkeypatch.setattr(EventFileWriter, "add_event", failing)
    with (
        pytest.warns(GradwatchWarning, match="may be missing"),
        pytest.raises(OSError, match="space"),
    ):
        writer.write(batches[1])
    monkeypatch.undo()
    age(tmp_path / "failing")  # the files of one second are read in the order of their names
    writer.write(batches[1])
    writer.close()
    straight = TensorBoardWriter(tmp_path / "straight")
    for batch in batches:
        straight.write(batch)
    straight.close()
    one, other = read(tmp_path / "failing"), read(tmp_path / "straight")
    assert one.tags() == other.tags()
    for tag in other.tags():
        assert one.series(tag) == other.series(tag)
    assert one.texts() == other.texts()
    assert len(one.raw_events()) == len(other.raw_events()) + len(one.files) - 1  # a head each


def test_a_disk_that_is_full_for_a_while(run, read, tmp_path, monkeypatch):
    """A watcher passes on what was missed, once the event file can be written again."""
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    whole, full = EventFileWriter.add_event, [False]

    def failing(self, event):
        if full[0]:
            raise OSError("No space left on device")
        whole(self, event)

    monkeypatch.setattr(EventFileWriter, "add_event", failing)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with watch(model, optimizer, sinks=[TensorBoardWriter(tmp_path)]) as watcher:
            for number in range(1, 11):
                full[0] = 3 <= number < 7
                model(torch.ones(1, 2)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                watcher.flush()
    texts = [str(one.message) for one in caught]
    assert len(texts) == 3
    assert "works again" in texts[2]
    assert read(tmp_path).steps("gradwatch/grad_norm") == list(range(1, 11))


def test_closed_writer_raises(run, tmp_path):
    """A writer takes nothing after close()."""
    writer = TensorBoardWriter(tmp_path)
    writer.close()
    with pytest.raises(RuntimeError, match="is closed and takes no more steps"):
        writer.write(run.batch(range(1, 2)))


def test_shared_writer_that_was_closed_raises(run, tmp_path):
    """No second file is begun behind the back of a user who closed the first."""
    summary_writer = SummaryWriter(tmp_path)
    writer = TensorBoardWriter(summary_writer)
    writer.write(run.batch(range(1, 2)))
    summary_writer.close()
    with pytest.raises(RuntimeError, match="was closed while gradwatch still writes to it"):
        writer.write(run.batch(range(2, 3)))
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("target", [None, 3, b"runs", object(), ["runs"]])
def test_refuses_other_targets(target):
    """What is neither folder nor SummaryWriter is refused with what to write instead."""
    with pytest.raises(TypeError) as error:
        TensorBoardWriter(target)
    assert re.match(r"log_dir_or_writer must be .*, got ", str(error.value))
    assert "Write TensorBoardWriter('runs/my_run')" in str(error.value)


def test_refuses_a_path_of_bytes(tmp_path):
    """A PathLike of bytes is refused like bytes."""

    class BytesPath:
        def __fspath__(self):
            return bytes(tmp_path)

    with pytest.raises(TypeError, match="a path of bytes"):
        TensorBoardWriter(BytesPath())


def test_refuses_an_empty_path():
    """An empty string is no folder; torch would make one up."""
    with pytest.raises(ValueError, match="must name a folder, got an empty one"):
        TensorBoardWriter("")


def test_refuses_a_file(tmp_path):
    """A path to a file is refused before the first step."""
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(ValueError, match="which is a file"):
        TensorBoardWriter(path)


def test_refuses_a_closed_summary_writer(tmp_path):
    """A writer that is closed already is refused before the first step."""
    summary_writer = SummaryWriter(tmp_path)
    summary_writer.close()
    with pytest.raises(ValueError, match="got a SummaryWriter that was closed"):
        TensorBoardWriter(summary_writer)


@pytest.mark.parametrize("name", ["every", "block_every"])
@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_refuses_bad_counts(tmp_path, name, value, error):
    """A number of steps is an integer of at least 1; the message shows name and value."""
    with pytest.raises(error, match=f"{name} must be .*got {value}"):
        TensorBoardWriter(tmp_path, **{name: value})


def test_missing_tensorboard_says_what_to_install(tmp_path):
    """Without tensorboard the import names the command that brings it."""
    code = (
        "import sys; sys.modules['tensorboard'] = None\n"
        "try:\n    import gradwatch_tensorboard\n"
        "except ModuleNotFoundError as exc:\n    print(exc.name, exc)\n"
    )
    result = processes.run(code=code)
    assert result.stdout.startswith("tensorboard gradwatch_tensorboard needs TensorBoard")
    assert "pip install 'gradwatch[tensorboard]'" in result.stdout

"""Two processes never write into one folder; one that was killed, closed or forked from may."""

import errno
import gc
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

import gradwatch
from gradwatch.history import load
from gradwatch.record.folder.lock import LOCK
from gradwatch.record.folder.writer import RunFolder

from . import runs

fcntl = pytest.importorskip("fcntl", reason="the system has no advisory locks")

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

WRITER = """
import os, sys, runs
sink = runs.write(sys.argv[1], runs.batch([1, 2]), close=False)
if "worker" in sys.argv:  # as a DataLoader has one; it outlives us
    worker = os.fork()
    if not worker:
        os.close(0), os.close(1), os.close(2)
        import signal
        signal.pause()
    print(worker, flush=True)
print("writes", flush=True)
sys.stdin.readline()
sink.close()
print("closed", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def writer(tmp_path):
    """Starts a process that writes into the folder; it is over after the test."""
    started = []

    def start(how="alone", folder=""):
        process = runs.child(WRITER, tmp_path / folder, how, stdin=runs.subprocess.PIPE)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def _in_a_fork(act):
    """Runs something in a fork of this process; whether it did what it should."""
    child = os.fork()
    if not child:
        try:
            os._exit(0 if act() else 1)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_second_process_is_refused_before_its_first_step(tmp_path, writer):
    """watch() names the folder, the process that has it, and what to do."""
    process = writer()
    assert process.stdout.readline() == "writes\n"
    text = f"'{tmp_path}' is in use: another process (pid {process.pid}) writes here; give each run"
    model = torch.nn.Linear(2, 1)
    with pytest.raises(ValueError, match=re.escape(text)):
        gradwatch.watch(model, torch.optim.SGD(model.parameters()), run_dir=tmp_path)
    assert not model.weight._backward_hooks
    assert runs.steps_of(tmp_path) == [1, 2]


def test_a_process_that_has_closed_its_run_is_not_in_the_way(tmp_path, writer):
    """The folder is free from close() on, also while that process goes on."""
    process = writer()
    process.stdout.readline()
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "closed\n"
    assert not (tmp_path / LOCK).exists()
    runs.write(tmp_path, runs.batch([3]))
    assert runs.assert_consistent(tmp_path) == 3


@pytest.mark.parametrize("how", ["alone", "worker"])
def test_a_killed_process_is_not_in_the_way(tmp_path, writer, how):
    """SIGKILL frees the folder at once, even where a worker of that process lives on."""
    process = writer(how)
    worker = int(process.stdout.readline()) if how == "worker" else None
    process.stdout.readline()
    process.kill()
    process.wait()
    try:
        assert (tmp_path / LOCK).exists()
        runs.write(tmp_path, runs.batch([3]))
    finally:
        if worker:
            os.kill(worker, signal.SIGKILL)
    assert runs.assert_consistent(tmp_path) == 3
    assert not (tmp_path / LOCK).exists()


def test_one_process_may_open_its_folder_twice(tmp_path):
    """Fitted again, or a notebook's cell run twice: the folder is taken until the last is closed."""
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    first.write(runs.batch([1]))
    first.close()
    first.close()
    assert (tmp_path / LOCK).read_text(encoding="utf-8").startswith(str(os.getpid()))
    second.write(runs.batch([2]))
    second.close()
    assert not (tmp_path / LOCK).exists()
    assert runs.assert_consistent(tmp_path) == 2


def test_a_folder_that_is_forgotten_is_free(tmp_path):
    """A RunFolder that nobody closed gives the folder back when it is collected."""
    sink = RunFolder(tmp_path)
    assert (tmp_path / LOCK).exists()
    del sink
    gc.collect()
    assert not (tmp_path / LOCK).exists()


def test_a_fork_may_write_where_its_parent_was_to(tmp_path, writer):
    """Launchers fork processes that train; neither they nor their end take the parent's right."""
    sink = RunFolder(tmp_path)
    assert _in_a_fork(lambda: runs.write(tmp_path, runs.batch([1])))
    assert (tmp_path / LOCK).exists()
    _, error = writer().communicate(timeout=600)
    assert f"another process (pid {os.getpid()}) writes here" in error
    sink.write(runs.batch([2]))
    sink.close()
    assert runs.steps_of(tmp_path) == [1, 2]


def test_reading_needs_no_right(tmp_path, writer):
    """A run that is being written is open to every reader, which leaves no file in it."""
    writer().stdout.readline()
    before = sorted(tmp_path.rglob("*"))
    assert load(tmp_path).steps().index.tolist() == [1, 2]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_disk_without_locks_has_no_guard(tmp_path, monkeypatch, number):
    """Some network file systems have none: the run is written, and no file is left behind."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    sink = runs.write(tmp_path, runs.batch([1]), close=False)
    assert not (tmp_path / LOCK).exists()
    sink.close()
    assert runs.steps_of(tmp_path) == [1]


def test_a_lock_that_goes_while_it_is_taken_is_taken_anew(tmp_path, monkeypatch):
    """What its owner removes between our opening and our locking is no lock."""
    lockf, gone = fcntl.lockf, []

    def late(file, how):
        if not gone:
            gone.append((tmp_path / LOCK).unlink())
        lockf(file, how)

    monkeypatch.setattr(fcntl, "lockf", late)
    sink = RunFolder(tmp_path)
    assert gone
    assert not _in_a_fresh_process(tmp_path)
    sink.close()
    assert _in_a_fresh_process(tmp_path)


def test_the_lock_of_another_process_is_left_alone(tmp_path, writer):
    """Where the folder was deleted and another process has made it anew, closing does not free it."""
    sink = RunFolder(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    process = writer(folder="run")
    assert process.stdout.readline() == "writes\n"
    sink.close()
    assert (tmp_path / "run" / LOCK).read_text(encoding="utf-8").startswith(f"{process.pid} ")


def _in_a_fresh_process(path):
    """Whether another process may write there."""
    code = "import sys, runs; runs.RunFolder(sys.argv[1]).close()"
    process = runs.child(code, path)
    _, error = process.communicate(timeout=600)
    assert process.returncode == 0 or "is in use" in error
    return process.returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_lock_without_a_name_is_a_lock(tmp_path, writer):
    """Where the owner could not write who it is, the refusal leaves that out."""
    sink = RunFolder(tmp_path)
    (tmp_path / LOCK).write_text(
        "", encoding="utf-8"
    )  # this process has it open twice; closing that frees the lock
    fcntl.lockf(next(iter(_descriptors(tmp_path / LOCK))), fcntl.LOCK_EX)
    _, error = writer().communicate(timeout=600)
    assert "is in use: another process writes here" in error
    sink.close()


def _descriptors(path):
    for link in Path("/proc/self/fd").iterdir():
        if link.resolve() == path:
            yield int(link.name)

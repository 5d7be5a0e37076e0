"""Killed with SIGKILL at any moment, a folder loads: no step twice, none missing but the last ones."""

import json
import os
import random
import re
import signal
import sys
import time
import warnings

import pandas as pd
import pytest

import gradwatch
from gradwatch.history import load
from gradwatch.record.folder import parts

from . import runs, training

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),  # pyarrow has threads, idle
]

FILE_EVENTS = {
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.truncate",
    "os.listdir",
    "os.scandir",
}

NOT_BEGUN = "holds no step yet|There is no folder|is not a run folder: it has no meta.json"


@pytest.fixture(scope="module", autouse=True)
def _imported(tmp_path_factory):
    """Has all that torch and pyarrow import at their first use: else a child is killed in that."""
    training.train(tmp_path_factory.mktemp("imported"), 2)


def forked(act):
    """Runs something in a copy of this process; returns its id at once."""
    child = os.fork()
    if child:
        return child
    try:
        act()
    except BaseException as error:
        os.write(2, f"{error!r}\n".encode())
        os._exit(1)
    os._exit(0)


def killed(child):
    """Waits for a child; whether it was killed. A failure of its own is one of the test."""
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def die_at(operation, folder):
    """Kills this process at the so many-th operation on a file of a folder."""
    count = 0

    def hook(event, arguments):
        nonlocal count
        if event in FILE_EVENTS and str(folder) in str(arguments[0]):
            count += 1
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _deliver_all(path, first, last):
    sink = runs.write(path, close=False)
    for step in range(first, last, 2):
        sink.write(runs.batch([step, step + 1], events=[runs.event(step)]))
    sink.close()


@pytest.mark.parametrize(
    "stride", [pytest.param(1, marks=pytest.mark.slow, id="each"), pytest.param(13, id="some")]
)
@pytest.mark.parametrize("resumed", [False, True])
def test_killed_between_any_two_file_operations(tmp_path, monkeypatch, stride, resumed):
    """Whatever operation on the files is the last one, merging and cutting ones included."""
    monkeypatch.setattr(parts, "FULL", 60)
    monkeypatch.setattr(parts, "LEVELS", (12, 60))
    operation, alive = 1 + random.randrange(stride), True
    while alive:
        path = tmp_path / str(operation)
        least = 0
        if resumed:
            _deliver_all(path, 1, 17)
            least = 10

        def act(path=path, operation=operation):
            die_at(operation, path)
            _deliver_all(path, 11 if resumed else 1, 31)

        alive = killed(forked(act))
        if not (path / "meta.json").exists():
            with pytest.raises((ValueError, FileNotFoundError), match=NOT_BEGUN):
                load(path)
            _deliver_all(path, 1, 5)  # what is there of it does not stop the next run
            assert runs.assert_consistent(path) == 4
        else:
            steps = runs.assert_consistent(path, least if alive else 30)
            events = load(path).events()["step"].tolist()
            assert events[: steps // 2] == list(range(1, steps + 1, 2))[: len(events)]
            _deliver_all(path, steps + 1, steps + 5)
            assert runs.assert_consistent(path) == steps + 4
            assert len(load(path).events()) == steps // 2 + 2
            assert len(pd.read_parquet(path / "steps")) == steps + 4
            assert len(pd.read_parquet(path / "parameters")) == (steps + 4) * 3
            assert not list(path.rglob(".*"))
        operation += stride
    assert operation > 60


def test_killed_while_an_earlier_run_is_set_aside(tmp_path):
    """Whatever operation is the last one: the next run goes on, and no number of the earlier is lost."""
    operation, alive = 1, True
    while alive:
        path = tmp_path / str(operation)
        _deliver_all(path, 1, 17)

        def act(path=path, operation=operation):
            die_at(operation, path)
            _deliver_all(path, 1, 5)

        with warnings.catch_warnings(category=gradwatch.GradwatchWarning, action="ignore"):
            alive = killed(forked(act))
            try:
                assert runs.assert_consistent(path) in {0, 2, 4, 16}
            except gradwatch.UnreadableError as error:
                assert re.search("holds no step yet.*'.*earlier-1'", str(error))  # noqa: PT017
            _deliver_all(path, 1, 9)
        assert runs.assert_consistent(path) == 8
        earlier = [runs.assert_consistent(folder) for folder in sorted(path.glob("earlier-*"))]
        assert earlier in ([16], [16, 2], [16, 4])
        events = load(path / "earlier-1").events()["step"].tolist()
        assert events == list(range(1, 17, 2))
        operation += 1
    assert operation > 20


def _killed_at_random(tmp_path, kills, seed):
    """Kills a training so many times, each time resumed from its checkpoint, then lets it finish."""
    random.seed(seed)
    path, done = tmp_path / "run", tmp_path / "progress"
    count = 0
    while count < kills:
        child = forked(lambda: training.train(tmp_path, training.FOREVER))
        _wait_for_steps(done, child, random.choice([0, *range(1, 120)]))
        time.sleep(random.uniform(0, 0.003))  # anywhere in what comes next, be it a step or a file
        os.kill(child, signal.SIGKILL)
        assert killed(child)
        count += 1
        progress = int(done.read_text(encoding="utf-8") or 0) if done.exists() else 0
        try:
            steps = load(path).steps().index.tolist()
        except (gradwatch.UnreadableError, FileNotFoundError) as error:
            assert re.search(NOT_BEGUN, str(error))  # noqa: PT017
            assert progress <= 64
            continue
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) >= progress - 64
        assert len(load(path).parameters()) == 4 * len(steps)
        done.unlink(missing_ok=True)
    saved = tmp_path / "checkpoint.json"
    return json.loads(saved.read_text(encoding="utf-8"))["step"] if saved.exists() else 0


def _wait_for_steps(progress, child, steps):
    """Waits until a training has made so many further steps; for none not even until it begins."""
    first = None
    while steps:
        told = progress.read_text(encoding="utf-8") if progress.exists() else ""
        first = int(told) if told and first is None else first
        if first is not None and int(told) >= first + steps - 1:
            return
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.002)


def _assert_like_uninterrupted(tmp_path, steps):
    """The resumed run's folder equals that of one that nobody killed, but for the clock."""
    assert not killed(forked(lambda: training.train(tmp_path, steps)))
    whole = tmp_path / "whole"
    whole.mkdir()
    assert not killed(forked(lambda: training.train(whole, steps)))
    one, other = load(tmp_path / "run"), load(whole / "run")
    pd.testing.assert_frame_equal(
        *(history.steps().drop(columns="time_s") for history in (one, other)), check_exact=True
    )
    pd.testing.assert_frame_equal(one.parameters(), other.parameters(), check_exact=True)
    pd.testing.assert_frame_equal(one.events(), other.events(), check_exact=True)
    assert (one.steps()["outcome"] != "applied").any()


@pytest.mark.parametrize(
    ("kills", "seed"),
    [(6, 0), *(pytest.param(20, seed, marks=pytest.mark.slow) for seed in range(1, 11))],
)
def test_a_training_killed_at_random_moments(tmp_path, kills, seed):
    """Each folder loads and lacks 64 steps at most; resumed to its end, the run is the uninterrupted one."""
    checkpoint = _killed_at_random(tmp_path, kills, seed)
    _assert_like_uninterrupted(tmp_path, max(checkpoint, 250) + 100)

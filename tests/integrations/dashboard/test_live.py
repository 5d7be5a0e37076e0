"""A run that is being written: the tab follows it, whoever else asks at the same time."""

import shutil
import threading

import numpy as np
import pytest

from tests.support.board import LOADERS, Board

from .logs import LogFile, event, write_run

FIRST, SECOND = "018000000001", "018000000002"


def last_step(board, run="live"):
    """The last step that the tab knows."""
    reply = board.get("layout", run=run, optimizer="AdamW")
    return reply.json()["last_step"] if reply.status == 200 else 0


@pytest.mark.parametrize("load_fast", LOADERS)
def test_follows_a_run(load_fast, tmp_path):
    """New windows, segments, events, parameters and sessions appear without a restart."""
    rng = np.random.default_rng(0)
    expected = np.full((3, 40), -2, "f4")
    with Board(tmp_path, load_fast, wait=False) as board:
        assert board.get_json("runs") == {"runs": []}
        with LogFile(tmp_path / "live") as log:
            log.add_layout(FIRST, "AdamW", ["a", "b"])
            for number, start in enumerate(range(1, 31, 10)):
                norms = rng.random((10, 2), "f4")
                expected[:2, start - 1 : start + 9] = norms.T
                steps = np.arange(start, start + 10)
                log.add_windows(FIRST, norms, (steps, steps), segment=number // 2)
                log.add_events(FIRST, [event(start)], step=start)
                board.wait(lambda start=start: last_step(board) == start + 9)
                found = board.heatmap("live", "AdamW")["norms"]
                np.testing.assert_array_equal(found, expected[:2, : start + 9])
                board.wait(lambda n=number: board.get_json("events", run="live")["total"] == n + 1)
            log.add_layout(SECOND, "AdamW", ["a", "b", "c"], step=25)
            norms = rng.random((16, 3), "f4")
            expected[:, 24:] = norms.T
            steps = np.arange(25, 41)
            log.add_windows(SECOND, norms, (steps, steps))
            board.wait(lambda: last_step(board) == 40)
            np.testing.assert_array_equal(board.heatmap("live", "AdamW")["norms"], expected)
            assert [e["step"] for e in board.get_json("events", run="live")["events"]] == [
                1,
                11,
                21,
            ]
            (run,) = board.get_json("runs")["runs"]
            assert run["optimizers"][0]["windows"] == 40


@pytest.mark.parametrize("load_fast", LOADERS)
def test_many_ask_at_once(load_fast, tmp_path):
    """Threads that ask while the run grows get whole answers, each as long as its header says."""
    write_run(tmp_path / "other", parameters=[f"p{i}" for i in range(50)])
    failures = []
    done = threading.Event()

    def ask(number):
        run = ("live", "other")[number % 2]
        heatmap = board.heatmap(run, "AdamW", columns=17 + number)
        assert heatmap["norms"].shape == (heatmap["parameters"], heatmap["columns"])
        assert (heatmap["norms"] >= 0).all()
        board.get_json("runs")
        curve = board.get_json("curve", run=run, optimizer="AdamW", parameter=1)
        assert len(curve["first"]) == len(curve["norm"])

    def ask_on(number):
        try:
            while not done.is_set():
                ask(number)
        except Exception as error:
            failures.append(error)

    with LogFile(tmp_path / "live") as log:
        log.add_layout(FIRST, "AdamW", ["a", "b"])
        log.add_windows(FIRST, np.ones((1, 2)), ([1], [1]))
        with Board(tmp_path, load_fast) as board:
            board.wait(lambda: last_step(board) == 1)
            threads = [threading.Thread(target=ask_on, args=(number,)) for number in range(8)]
            for thread in threads:
                thread.start()
            for step in range(2, 60):
                log.add_windows(FIRST, np.full((1, 2), step), ([step], [step]), segment=step // 10)
            board.wait(lambda: last_step(board) == 59 or failures)
            done.set()
            for thread in threads:
                thread.join()
            assert not failures
            assert "The Gradients tab has failed" not in board.log


@pytest.mark.parametrize("load_fast", LOADERS)
def test_a_log_folder_that_vanishes(load_fast, tmp_path):
    """When the folder is removed the tab goes on with what TensorBoard still holds."""
    logdir = tmp_path / "runs"
    write_run(logdir / "a")
    with Board(logdir, load_fast) as board:
        board.heatmap("a", "AdamW")
        shutil.rmtree(logdir)
        for _ in range(20):
            assert board.get("runs").status == 200
            assert board.get("heatmap", run="a", optimizer="AdamW").status in (200, 404)
            threading.Event().wait(0.1)
        assert "The Gradients tab has failed" not in board.log

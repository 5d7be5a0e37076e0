"""JSONLinesSink: strict JSON, whole lines, no step twice."""

import json
import math
import signal
import subprocess

import numpy as np
import pandas as pd
import pytest
import torch

import gradwatch
from gradwatch import Event, Layout, RecordBatch, StepRecord
from gradwatch_loggers import JSONLinesSink
from gradwatch_loggers.line_file import CHUNK, LineFile
from tests.support import processes


def _no_constant(name):
    raise AssertionError(f"{name} is no JSON")


def objects(path, kind=None):
    """The objects in a file of whole lines of strict JSON, all or those of a type."""
    lines = path.read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    found = [json.loads(line, parse_constant=_no_constant) for line in lines]
    return [one for one in found if kind in (None, one["type"])]


def steps(path):
    """The numbers of the steps in a file."""
    return [one["step"] for one in objects(path, "step")]


@pytest.mark.parametrize("deliver", ["step", "batch"])
def test_a_line_per_step_with_all_columns(train, tmp_path, deliver):
    """200 of 200 steps have all columns of history.steps(), and equal numbers."""
    path = tmp_path / "runs" / "run.jsonl"
    sink = JSONLinesSink(path, deliver=deliver)
    assert not path.parent.exists()
    watcher, _ = train(sink, steps=200, nan_at=(7,))
    frame = pd.read_json(path, lines=True, precise_float=True)
    frame = frame[frame["type"] == "step"].set_index("step")
    expected = watcher.history.steps()
    for column in expected.columns:
        if pd.api.types.is_float_dtype(expected[column]):
            np.testing.assert_array_equal(frame[column], expected[column])
        else:
            assert frame[column].tolist() == expected[column].tolist(), column
    assert {tuple(one) for one in objects(path, "step")} == {tuple(objects(path, "step")[0])}


def test_unknown_is_null_and_nan_is_nan(train, tmp_path):
    """A NaN gradient is the string "NaN"; a number that is not known is null."""
    path = tmp_path / "run.jsonl"
    train(JSONLinesSink(path), steps=3, nan_at=(2,))
    first, bad, _ = objects(path, "step")
    assert (bad["grad_norm"], bad["grad_norm_clipped"]) == ("NaN", "NaN")
    assert first["loss"] is None
    assert isinstance(first["grad_norm"], float)
    sink = JSONLinesSink(tmp_path / "inf.jsonl")
    record = StepRecord(1, "SGD", grad_norm=math.inf, noise_scale_high=-math.inf)
    sink.write(RecordBatch(Layout((), ()), [record], np.empty((1, 0)), np.empty((1, 0))))
    sink.close()
    (row,) = objects(tmp_path / "inf.jsonl")
    assert (row["grad_norm"], row["noise_scale_high"]) == ("Infinity", "-Infinity")


@pytest.mark.parametrize("deliver", ["step", "batch"])
def test_events_are_lines_before_their_step(train, tmp_path, deliver):
    """Each event has the columns of history.events(), and comes before the line of its step."""
    path = tmp_path / "run.jsonl"
    watcher, _ = train(JSONLinesSink(path, deliver=deliver), steps=5, nan_at=(3,))
    kinds = [(one["type"], one["step"], one.get("kind")) for one in objects(path)]
    assert kinds == [
        ("step", 1, None),
        ("step", 2, None),
        ("event", 3, "nan"),
        ("event", 3, "skipped"),
        ("step", 3, None),
        ("step", 4, None),
        ("step", 5, None),
    ]
    told = watcher.history.events().iloc[0]
    event = objects(path, "event")[0]
    assert event["message"] == told["message"]
    assert event["nan_count"] == told["nan_count"]


def test_it_can_be_read_while_it_is_written(train, tmp_path):
    """On a CPU a step is in the file when optimizer.step() has returned."""
    path = tmp_path / "run.jsonl"

    def look(step):
        if step > 1:
            assert steps(path) == list(range(1, step))

    train(JSONLinesSink(path), steps=6, before_step=look)


def test_blocks_and_statistics(train, tmp_path):
    """Norms of parts of the model are in the line of the step, statistics where they are taken."""
    path = tmp_path / "run.jsonl"
    sink = JSONLinesSink(path, blocks=True, statistics=True)
    watcher, _ = train(sink, steps=4, statistics=("norm", "max"), every=3)
    rows = objects(path, "step")
    norms = watcher.history.parameters()
    for row in rows:
        of = norms[(norms["step"] == row["step"]) & norms["parameter"].str.startswith("2.")]
        total = math.sqrt((of["grad_norm"] ** 2).sum())
        assert row["blocks/2"] == pytest.approx(total, rel=1e-6)
    assert ["max/2" in row for row in rows] == [True, False, False, True]


def test_a_resumed_run_replaces_the_steps_it_takes_again(train, tmp_path):
    """After a resume from step 3 each step is there once, with the numbers of the second time."""
    path = tmp_path / "run.jsonl"
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    state = None
    with gradwatch.watch(model, optimizer, sinks=[JSONLinesSink(path)]) as watcher:
        for step in range(1, 7):
            (model(torch.randn(8, 4)).sum() * (math.nan if step == 5 else 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 3:
                state = watcher.state_dict()
    assert steps(path) == [1, 2, 3, 4, 5, 6]
    watcher, _ = train(JSONLinesSink(path), steps=4, state=state)
    assert steps(path) == [1, 2, 3, 4, 5, 6, 7]
    assert objects(path, "event") == []
    again = [row["grad_norm"] for row in objects(path, "step")][3:]
    assert again == watcher.history.steps()["grad_norm"].tolist()
    assert list(tmp_path.iterdir()) == [path]


def test_several_optimizers_are_resumed(tmp_path):
    """Each optimizer goes on at its own step; lines of another hand stay."""
    path = tmp_path / "run.jsonl"

    def rows(*of):
        records = [StepRecord(step, optimizer) for optimizer, step in of]
        empty = np.empty((len(records), 0))
        return RecordBatch(Layout((), ()), records, empty, empty)

    first = JSONLinesSink(path)
    first.write(rows(("D", 1), ("D", 2), ("G", 1), ("D", 3), ("D", 4), ("G", 2)))
    first.close()
    with path.open("a") as file:
        file.write("a note of the user's\n")
    second = JSONLinesSink(path)
    second.write(rows(("D", 3)))
    second.write(rows(("D", 4), ("G", 2)))
    second.close()
    found = [(one["optimizer"], one["step"]) for one in objects(path)]
    assert found == [("D", 1), ("D", 2), ("G", 1), ("D", 3), ("D", 4), ("G", 2)]


def test_a_resumed_run_after_the_end_appends(train, tmp_path):
    """A run that goes on where the file ends keeps every line, those of others too."""
    path = tmp_path / "run.jsonl"
    watcher, _ = train(JSONLinesSink(path), steps=3)
    with path.open("a") as file:
        file.write("a note of the user's\n")
    train(JSONLinesSink(path), steps=2, state=watcher.state_dict())
    lines = path.read_text().splitlines()
    assert lines.pop(3) == "a note of the user's"
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]


def test_a_new_run_moves_the_earlier_one_away(train, tmp_path):
    """A run that begins at step 1 again loses nobody's lines: they are in a file beside it."""
    path = tmp_path / "run.jsonl"
    path.touch()
    train(JSONLinesSink(path), steps=3)
    for number in (1, 2):
        with pytest.warns(gradwatch.GradwatchWarning, match=f"is in .*run.earlier-{number}.jsonl"):
            train(JSONLinesSink(path), steps=2)
    assert steps(path) == [1, 2]
    assert steps(tmp_path / "run.earlier-1.jsonl") == [1, 2, 3]
    assert steps(tmp_path / "run.earlier-2.jsonl") == [1, 2]


def test_a_half_line_is_cut_off(train, tmp_path):
    """What a loss of power has left of a line is gone when a run goes on."""
    path = tmp_path / "run.jsonl"
    watcher, _ = train(JSONLinesSink(path), steps=3)
    with path.open("a") as file:
        file.write('{"type": "step", "step": 4, "gra')
    train(JSONLinesSink(path), steps=1, state=watcher.state_dict())
    assert steps(path) == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_killed_process_leaves_whole_lines(tmp_path):
    """After kill -9 in the middle of a training every line is whole, and none is missing before."""
    path = tmp_path / "run.jsonl"
    process = processes.start(
        path,
        code="""
        import sys
        import torch, gradwatch
        from gradwatch_loggers import JSONLinesSink

        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with gradwatch.watch(model, optimizer, sinks=[JSONLinesSink(sys.argv[1])]):
            step = 0
            while True:
                model(torch.ones(1, 4)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                print(step, flush=True)
        """,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        seen = next(int(line) for line in process.stdout if int(line) >= 30)
        process.send_signal(signal.SIGKILL)
    found = steps(path)
    assert found == list(range(1, len(found) + 1))
    assert len(found) >= seen


@pytest.mark.slow
def test_a_full_disk_leaves_no_half_line(tmp_path):
    """What did not fit is written whole once there is room; the training goes on meanwhile."""
    path = tmp_path / "run.jsonl"
    done = processes.run(
        path,
        code="""
        import resource, signal, sys
        import torch, gradwatch
        from gradwatch_loggers import JSONLinesSink

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        with gradwatch.watch(model, optimizer, sinks=[JSONLinesSink(sys.argv[1])]):
            for step in range(1, 41):
                if step in (5, 30):
                    size = 5_000 if step == 5 else hard
                    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
                model(torch.ones(1, 4)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                if step == 29:
                    text = open(sys.argv[1]).read()
                    assert text.endswith("}\\n") and len(text) <= 5_000, text[-100:]
        """,
    )
    assert done.returncode == 0, done.stderr
    assert "JSONLinesSink failed in write() with OSError" in done.stderr
    assert "works again" in done.stderr
    assert steps(path) == list(range(1, 41))


def test_lines_backwards(tmp_path):
    """Lines of any length come from the last to the first, with their places."""
    path = tmp_path / "lines"
    lines = [b"a\n", b"\n", b"b" * (2 * CHUNK) + b"\n", b"c" * (CHUNK - 1) + b"\n", b"d\n"]
    file = LineFile(path)
    assert list(file.backwards()) == []
    file.append(b"".join(lines))
    places = np.cumsum([0, *map(len, lines)])[:-1].tolist()
    assert list(file.backwards()) == list(zip(places, lines, strict=True))[::-1]
    file.close()


def test_wrong_arguments_are_refused(tmp_path):
    """Each error names the argument and what to write."""
    (tmp_path / "file").touch()
    with pytest.raises(TypeError, match=r"JSONLinesSink\(path\) must be the path of a file, got 3"):
        JSONLinesSink(3)
    with pytest.raises(TypeError, match=r"JSONLinesSink\(path\)"):
        JSONLinesSink(b"run.jsonl")
    with pytest.raises(ValueError, match=r"JSONLinesSink\(path\) must not be empty. Write 'run.js"):
        JSONLinesSink("")
    for folder in (tmp_path, f"{tmp_path}/new/"):
        with pytest.raises(ValueError, match=r"is a folder. Write '.*run.jsonl'"):
            JSONLinesSink(folder)
    with pytest.raises(ValueError, match=r"file' is a file. Name another folder"):
        JSONLinesSink(tmp_path / "file" / "run.jsonl")
    with pytest.raises(TypeError, match=r"JSONLinesSink\(statistics=\) must be True or False"):
        JSONLinesSink("run.jsonl", statistics=("max",))
    with pytest.raises(ValueError, match=r"JSONLinesSink\(deliver=\)"):
        JSONLinesSink("run.jsonl", deliver="steps")


def test_a_closed_sink_says_so(train, tmp_path):
    """It does not take a second run."""
    sink = JSONLinesSink(tmp_path / "run.jsonl")
    train(sink, steps=1)
    with pytest.warns(gradwatch.GradwatchWarning, match="JSONLinesSink is closed"):
        train(sink, steps=1)


def test_events_of_steps_that_never_came_stay_in_order():
    """An event without a step stands where its step would be, or at the end."""
    from gradwatch_loggers.order import in_order

    def event(step):
        return Event(step, 1, "nan", "p", "", 1.0, 0, "", optimizer="SGD")

    records = [StepRecord(step, "SGD") for step in (1, 3)]
    events = [event(1), event(2), event(4)]
    empty = np.empty((2, 0))
    batch = RecordBatch(Layout((), ()), records, empty, empty, events=events)
    found = [(type(one).__name__, one.step) for one in in_order(batch)]
    assert found == [
        ("Event", 1), ("StepRecord", 1), ("Event", 2), ("StepRecord", 3), ("Event", 4)
    ]  # fmt: skip

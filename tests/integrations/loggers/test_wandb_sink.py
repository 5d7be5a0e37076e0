"""WandbSink in real runs of W&B, offline; what they hold is read from their own file."""

import copy
import json
import math
import pickle
import random
import threading

import numpy as np
import pytest
import torch

import gradwatch
from gradwatch import GradwatchWarning

wandb = pytest.importorskip("wandb", reason="NOT TESTED: WandbSink, without wandb")

from gradwatch_loggers import WandbSink  # noqa: E402
from tests.support.wandb_runs import (  # noqa: E402
    file_of,
    records,
    rows,
    run_in,
    series,
    start,
)

NORM = "gradwatch/grad_norm"


class Training:
    """A small model that is trained step by step."""

    def __init__(self, parts=1, seed=0, nan_at=()):
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
        groups = [self.model.parameters()] if parts == 1 else [m.parameters() for m in self.model]
        self.optimizers = [torch.optim.SGD(group, lr=0.01) for group in groups]
        self.step, self.nan_at = 0, nan_at

    def watch(self, *sinks, **options):
        return gradwatch.watch(self.model, self.optimizers, sinks=list(sinks), **options)

    def train(self, steps=1):
        for _ in range(steps):
            self.step += 1
            inputs = torch.randn(8, 4)
            if self.step in self.nan_at:
                inputs[0, 0] = math.nan
            loss = self.model(inputs).square().mean()
            loss.backward()
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return loss.item()


def told(watcher, column="grad_norm", optimizer=None):
    """What the history says, as :func:`series` returns it."""
    steps = watcher.history.steps()
    if optimizer is not None:
        steps = steps[steps["optimizer"] == optimizer]
    return list(zip(steps.index, steps[column], strict=True))


def count(run, training):
    """Each step, from 1."""
    for step in range(1, 201):
        run.log({"loss": training.train(), "at": step}, step=step)


def count_from_0(run, training):
    """Each step, from 0."""
    for step in range(200):
        wandb.log({"loss": training.train(), "at": step}, step=step)


def count_every_10th(run, training):
    """Every tenth step."""
    for step in range(10, 201, 10):
        run.log({"loss": training.train(10), "at": step}, step=step)


def count_epochs(run, training):
    """Epochs of 100 steps."""
    for epoch in range(2):
        run.log({"loss": training.train(100), "at": epoch}, step=epoch)


def leave_it(run, training):
    """Two parts of a row, without a step."""
    for _ in range(200):
        wandb.log({"loss": training.train()}, commit=False)
        run.log({"accuracy": 1.0})


def log_nothing(run, training):
    """Only gradwatch logs."""
    training.train(200)


@pytest.mark.parametrize(
    "loop", [count, count_from_0, count_every_10th, count_epochs, leave_it, log_nothing]
)
def test_all_rows_of_both_sides_arrive(loop, tmp_path):
    """All 200 of ours equal the history, and what the user logged is there at his steps."""
    training = Training()
    with run_in(tmp_path) as run, training.watch(WandbSink(run, media=False)) as watcher:
        loop(run, training)
    found = rows(tmp_path)
    for column in ("grad_norm", "grad_norm_clipped", "clip_coef", "nonfinite_parameters"):
        assert series(found, f"gradwatch/{column}") == told(watcher, column)
    his = [row for row in found if "loss" in row]
    assert [row["_step"] for row in his] == [row.get("at", row["_step"]) for row in his]
    expected = {count: 200, count_from_0: 200, count_every_10th: 20, count_epochs: 2, leave_it: 200}
    assert len(his) == expected.get(loop, 0)
    assert [row for row in his if loop is leave_it and "accuracy" not in row] == []


def test_nan_and_inf_arrive_as_such(tmp_path):
    """A norm that is NaN, and one that is Inf, are read back as they are."""
    training = Training(nan_at=[3])
    with (
        run_in(tmp_path) as run,
        training.watch(WandbSink(run, media=False), on_nonfinite="skip") as watcher,
    ):
        training.train(4)
        (training.model[0].weight.sum() * math.inf).backward()
        training.optimizers[0].step()
        training.optimizers[0].zero_grad()
    norms = dict(series(rows(tmp_path), NORM))
    assert math.isnan(norms[3])
    assert norms[5] == math.inf
    assert norms.keys() == set(watcher.history.steps().index)


def test_each_optimizer_has_its_axis_and_its_charts(tmp_path):
    """Blocks and statistics of the second are in groups of their own, over its own steps."""
    training = Training(parts=2)
    sink = WandbSink(blocks=True, statistics=True, media=False)
    options = {"statistics": ("norm", "max"), "every": 5}
    with run_in(tmp_path), training.watch(sink, **options) as watcher:
        for _ in range(10):
            wandb.log({"loss": training.train()})
    found, steps = rows(tmp_path), watcher.history.steps()
    first, second = steps["optimizer"].unique()
    for group, label in (("gradwatch", first), (f"gradwatch-{second}", second)):
        assert series(found, f"{group}/grad_norm") == told(watcher, optimizer=label)
    axes = {
        record.metric.glob_name: record.metric.step_metric
        for record in records(file_of(tmp_path))
        if record.WhichOneof("record_type") == "metric" and record.metric.glob_name
    }
    assert axes == {
        f"{group}{part}/*": f"{group}/step"
        for group in ("gradwatch", f"gradwatch-{second}")
        for part in ("", "_blocks", "_max")
    }
    assert sum("gradwatch_max/0" in row for row in found) == 2
    assert sum("gradwatch_blocks/0" in row for row in found) == 10
    assert len(found) == 10


def test_two_watchers_share_a_run(tmp_path):
    """The second one's tags begin with 2 or with its name; what the user logs later is kept."""
    one, two, three = Training(), Training(seed=1), Training(seed=2)
    with run_in(tmp_path) as run:
        with (
            one.watch(WandbSink(run, media=False)) as first,
            two.watch(WandbSink(run, media=False)) as second,
            three.watch(WandbSink(run, name="critic", media=False)) as third,
        ):
            for step in range(1, 11):
                one.train()
                two.train(2)
                three.train()
                run.log({"loss": step}, step=step)
        run.log({"test": 1.0}, step=10)
    found = rows(tmp_path)
    assert series(found, NORM) == told(first)
    assert series(found, f"2/{NORM}") == told(second)
    assert series(found, f"critic/{NORM}") == told(third)
    assert [row["_step"] for row in found if "loss" in row] == list(range(1, 11))
    assert [row["_step"] for row in found if "test" in row] == [10]


def test_a_second_training_goes_on_in_the_same_charts(tmp_path):
    """Its sink has the tags of the first one, which is closed."""
    training = Training()
    with run_in(tmp_path) as run:
        with training.watch(WandbSink(run, media=False)):
            training.train(3)
        with training.watch(WandbSink(run, media=False)):
            training.train(2)
    assert [step for step, _ in series(rows(tmp_path), NORM)] == [1, 2, 3, 1, 2]


@pytest.mark.slow
def test_pictures_report_and_events_come_at_the_end(tmp_path):
    """They are in the row of the newest step, or behind it, and cost no row."""
    pytest.importorskip("matplotlib")
    training = Training(nan_at=[5])
    with run_in(tmp_path) as run, training.watch(WandbSink(run), on_nonfinite="skip") as watcher:
        for step in range(1, 21):
            run.log({"loss": training.train()}, step=step)
    found = rows(tmp_path)
    drawn = [row for row in found if "gradwatch/heatmap/path" in row]
    # The first one at the first row of the user's after the NaN.
    assert [row["gradwatch/step"] for row in drawn] == [5, 20]
    folder = file_of(tmp_path).parent / "files"
    for row in drawn:
        assert (folder / row["gradwatch/heatmap/path"]).read_bytes()[:4] == b"\x89PNG"
        assert "gradwatch" in (folder / row["gradwatch/report/path"]).read_text(encoding="utf-8")
    table = json.loads((folder / drawn[-1]["gradwatch/events/path"]).read_text(encoding="utf-8"))
    kinds = [row[table["columns"].index("kind")] for row in table["data"]]
    assert kinds == [event.kind for event in watcher.events]
    assert [row["_step"] for row in found if "loss" in row] == list(range(1, 21))
    assert [step for step, _ in series(found, NORM)] == list(range(1, 21))


def test_the_first_nan_is_an_alert(tmp_path):
    """One, with the message of the event; what a GradScaler skips in its search is none."""
    training = Training(nan_at=[2, 3])
    with (
        run_in(tmp_path) as run,
        training.watch(WandbSink(run, alert=True, media=False), on_nonfinite="skip") as watcher,
    ):
        training.train(4)
    alerts = [
        record.alert
        for record in records(file_of(tmp_path))
        if record.WhichOneof("record_type") == "alert"
    ]
    assert [(one.title, one.level) for one in alerts] == [("gradwatch: nan in step 2", "ERROR")]
    assert alerts[0].text == watcher.events[0].message


def test_without_a_run_the_training_goes_on(tmp_path):
    """The warning says what to call, and a run that is made later gets what it missed."""
    training = Training()
    with training.watch(WandbSink(media=False)) as watcher:
        with pytest.warns(GradwatchWarning, match=r"Call wandb\.init\(\) before the first step"):
            training.train(2)
        with run_in(tmp_path), pytest.warns(GradwatchWarning, match="works again"):
            training.train(20)
    assert series(rows(tmp_path), NORM) == told(watcher)


def test_a_run_may_be_finished_before_the_watcher_is_closed(tmp_path):
    """All steps until then are there; those after it are counted in a warning."""
    training, run = Training(), start(tmp_path)
    watcher = training.watch(WandbSink(run, media=False)).attach()
    for _ in range(5):
        run.log({"loss": training.train()}, step=0)
    wandb.finish()
    with pytest.warns(GradwatchWarning, match="was finished before the watcher was closed"):
        training.train(3)
    with pytest.warns(GradwatchWarning, match="Lost: steps 3"):
        watcher.close()
    assert series(rows(tmp_path), NORM) == told(watcher)[:5]


def test_the_next_run_gets_the_next_steps(tmp_path):
    """WandbSink() follows wandb.run."""
    training = Training()
    with training.watch(WandbSink(media=False)) as watcher:
        with run_in(tmp_path / "first"):
            training.train(3)
        with run_in(tmp_path / "second"):
            training.train(4)
    assert series(rows(tmp_path / "first"), NORM) == told(watcher)[:3]
    assert series(rows(tmp_path / "second"), NORM) == told(watcher)[3:]


def test_a_log_that_was_kept_from_before_costs_nothing(tmp_path):
    """Rows that are logged past us raise the step, and none of ours goes into one that is dropped."""
    training = Training()
    with run_in(tmp_path) as run:
        kept = run.log
        with training.watch(WandbSink(run, media=False)) as watcher:
            for step in range(1, 41):
                loss = training.train()
                log = kept if step <= 20 else run.log
                if step % 10 == 0:
                    log({"loss": loss}, step=step)
    found = rows(tmp_path)
    assert series(found, NORM) == told(watcher)
    assert [row["_step"] for row in found if "loss" in row] == [10, 20, 30, 40]


def test_log_is_what_it_was_when_the_run_ends(tmp_path):
    """Nothing of ours is left on the run, nor on wandb; an error of the user's is his own."""
    training, run = Training(), start(tmp_path)
    before = run.log
    with training.watch(WandbSink(run, media=False)):
        training.train(2)
        assert run.log != before
        assert run.log.__doc__ == before.__doc__
        with pytest.raises(TypeError, match="must be passed a dictionary"):
            run.log(3)
        with pytest.raises(TypeError, match="must be strings"):
            run.log({3: 3}, step=1)
        log = run.log
    run.finish()
    assert "log" not in vars(run)
    assert "gradwatch" not in repr(wandb.log)
    with pytest.raises(wandb.errors.UsageError, match="is finished"):
        log({"late": 1})
    assert [step for step, _ in series(rows(tmp_path), NORM)] == [1, 2]


def test_a_run_that_needs_nothing_more_is_let_go_at_once(tmp_path):
    """If nothing waits and the step is the user's own, the stand-in goes with the watcher."""
    training = Training()
    with run_in(tmp_path) as run:
        with training.watch(WandbSink(run, media=False)):
            for step in range(1, 4):
                run.log({"loss": training.train()}, step=step)
        assert "log" not in vars(run)


def test_a_row_that_fails_at_the_end_is_tried_again(tmp_path):
    """The rows that have waited for the end of the run are there although one call has failed."""
    training, run = Training(), start(tmp_path)
    log, calls = run.log, []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 8:
            raise OSError("network")
        return log(*args, **kwargs)

    run.log = failing
    with training.watch(WandbSink(run, media=False)) as watcher:
        training.train(20)
    run.finish()
    assert series(rows(tmp_path), NORM) == told(watcher)


def test_a_disabled_run_takes_nothing(tmp_path):
    """The training goes on without a word."""
    training = Training()
    with run_in(tmp_path, mode="disabled") as run, training.watch(WandbSink(run)) as watcher:
        training.train(3)
    assert len(watcher.history) == 3


@pytest.mark.slow
def test_the_training_is_the_same_to_the_bit(tmp_path):
    """Weights and the states of all random generators, with a NaN, pictures and an alert."""
    ends = []
    for sinks in (0, 1):
        random.seed(0)
        np.random.seed(0)
        training = Training(nan_at=[5])
        with run_in(tmp_path / str(sinks)) as run:
            sink = WandbSink(run, alert=True, blocks=True)
            with training.watch(*[sink] * sinks, on_nonfinite="skip"):
                for _ in range(10):
                    run.log({"loss": training.train()})
        weights = [parameter.detach() for parameter in training.model.parameters()]
        ends.append((weights, random.random(), np.random.rand(), torch.rand(3).tolist()))
    assert all(map(torch.equal, ends[0][0], ends[1][0]))
    assert ends[0][1:] == ends[1][1:]


def test_the_user_may_log_from_another_thread(tmp_path):
    """All rows of both threads and all of ours arrive, each once."""
    training, over, logged = Training(), threading.Event(), []

    def log():
        while not over.is_set():
            run.log({"other": len(logged)})
            logged.append(len(logged))

    with run_in(tmp_path) as run:
        thread = threading.Thread(target=log)
        thread.start()
        with training.watch(WandbSink(run, media=False)) as watcher:
            for step in range(50):
                training.train()
                run.log({"mine": step})
        over.set()
        thread.join()
    found = rows(tmp_path)
    assert series(found, NORM) == told(watcher)
    assert [row["other"] for row in found if "other" in row] == logged
    assert [row["mine"] for row in found if "mine" in row] == list(range(50))


def test_a_sink_can_be_copied_and_pickled(tmp_path):
    """A copy has the same settings and has written nothing."""
    training = Training()
    with run_in(tmp_path), training.watch(sink := WandbSink(name="a", media=False)) as watcher:
        training.train(2)
        for copied in (copy.deepcopy(sink), pickle.loads(pickle.dumps(sink))):
            with Training().watch(copied) as other:
                other.flush()
        assert len(pickle.loads(pickle.dumps(watcher)).history) == 2
        training.train(2)
    assert series(rows(tmp_path), f"a/{NORM}") == told(watcher)


BAD = [
    ({"run": "my-run"}, TypeError, r"takes what wandb\.init\(\) returned.*got 'my-run'"),
    ({"alert": 1}, TypeError, r"WandbSink\(alert=\) must be True or False, got 1"),
    ({"live": "no"}, TypeError, r"WandbSink\(live=\) must be True, False or None, got 'no'"),
    ({"name": None}, TypeError, r"WandbSink\(name=\) must be a string, got None"),
    ({"name": "/a"}, ValueError, r"neither begins nor ends with a slash, got '/a'"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), BAD)
def test_bad_arguments_are_refused(arguments, error, text):
    """Before anything is watched."""
    with pytest.raises(error, match=text):
        WandbSink(**arguments)

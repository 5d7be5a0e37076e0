"""ScalarSink: every step reaches the function, and the function never reaches the training."""

import math
import pickle
import random
import threading
import time

import numpy as np
import pytest
import torch

import gradwatch
from gradwatch_loggers import ScalarSink, background
from tests.support import processes


@pytest.mark.parametrize("in_background", [True, False])
@pytest.mark.parametrize("deliver", ["batch", "step"])
def test_all_steps_arrive_with_their_numbers(train, in_background, deliver):
    """200 of 200 steps come, in order, equal to history.steps(), NaN among them."""
    seen = []
    sink = ScalarSink(
        lambda step, scalars: seen.append((step, scalars)),
        background=in_background,
        deliver=deliver,
    )
    watcher, _ = train(sink, steps=200, nan_at=(7,))
    assert [step for step, _ in seen] == list(range(1, 201))
    steps = watcher.history.steps()
    for column in ("grad_norm", "grad_norm_clipped", "clip_coef", "nonfinite_parameters"):
        values = [scalars[f"gradwatch/{column}"] for _, scalars in seen]
        np.testing.assert_array_equal(values, steps[column].to_numpy(float))
    assert math.isnan(seen[6][1]["gradwatch/grad_norm"])
    assert all(type(step) is int for step, _ in seen)
    assert {type(value) for _, scalars in seen for value in scalars.values()} == {float}


def test_the_step_is_that_of_loggers(train):
    """The function gets global_step, where the framework counts otherwise."""
    seen = []
    sink = ScalarSink(lambda step, scalars: seen.append(step))
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watcher = gradwatch.watch(model, optimizer, sinks=[sink])
    counted = iter(range(100, 200, 10))
    watcher.global_step = lambda: next(counted)
    with watcher:
        for _ in range(3):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
    assert seen == [100, 110, 120]


def test_each_step_in_the_thread_that_trains():
    """With background=False and deliver="step" the function has run when optimizer.step() returns."""
    seen = []
    sink = ScalarSink(
        lambda step, scalars: seen.append((step, threading.current_thread())),
        background=False,
        deliver="step",
    )
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer, sinks=[sink]):
        for step in (1, 2, 3):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            assert seen[-1] == (step, threading.current_thread())


def test_blocks_and_statistics(train):
    """Norms of parts of the model come with each step, statistics in the steps where they are taken."""
    seen = {}
    sink = ScalarSink(seen.__setitem__, blocks=True, statistics=True)
    watcher, _ = train(sink, steps=6, statistics=("norm", "max"), every=3)
    norms = watcher.history.parameters()
    for step in range(1, 7):
        rows = norms[(norms["step"] == step) & norms["parameter"].str.startswith("0.")]
        total = math.sqrt((rows["grad_norm"] ** 2).sum())
        assert seen[step]["gradwatch_blocks/0"] == pytest.approx(total, rel=1e-6)
    assert [step for step in seen if "gradwatch_max/0" in seen[step]] == [1, 4]


@pytest.mark.parametrize("kind", ["slow", "broken", "hangs"])
def test_a_bad_function_costs_records_and_no_steps(train, monkeypatch, kind):
    """Weights, random states and records are those of a training without the sink; losses are told."""
    end = threading.Event()

    def function(step, scalars):
        if kind == "broken":
            raise ConnectionError("down")
        if kind == "hangs":
            end.wait()
        time.sleep(0.02)

    def is_fast(step):
        assert time.perf_counter() - began < 60

    random.seed(0)
    _, expected = train(steps=100)
    state = random.getstate()
    random.seed(0)
    began = time.perf_counter()
    sink = ScalarSink(function, wait_s=0.05, most_waiting=10)
    with pytest.warns(gradwatch.GradwatchWarning, match="ScalarSink") as told:
        watcher, weights = train(sink, steps=100, before_step=is_fast)
    end.set()
    assert all(map(torch.equal, weights, expected))
    assert random.getstate() == state
    assert len(watcher.history.steps()) == 100
    assert any("lost" in str(one.message) for one in told)
    assert len(told) <= 3


def test_a_function_that_fails_here_is_given_the_rest_later(train):
    """With background=False a row at which it raises is passed again, and no row before it."""
    seen, failures = [], [3, 3, 5]

    def function(step, scalars):
        if failures and failures[0] == step:
            raise OSError(failures.pop(0))
        seen.append(step)

    sink = ScalarSink(function, background=False)
    with pytest.warns(gradwatch.GradwatchWarning, match="ScalarSink"):
        train(sink, steps=200)
    assert seen == list(range(1, 201))


def test_a_function_may_change_what_it_gets(train, monkeypatch):
    """The dict is the function's own, also when it is called again."""
    monkeypatch.setattr(background, "PAUSE_S", 0.0)
    seen, failed = [], []

    def function(step, scalars):
        norm = scalars.pop("gradwatch/grad_norm")
        if not failed:
            failed.append(step)
            raise OSError
        seen.append(norm)

    watcher, _ = train(ScalarSink(function), steps=3)
    assert seen == watcher.history.steps()["grad_norm"].tolist()


def test_flush_waits_on_request(train):
    """watcher.flush() hands over and does not wait; sink.flush() does."""
    seen, go = [], threading.Event()

    def function(step, scalars):
        go.wait()
        seen.append(step)

    sink = ScalarSink(function)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer, sinks=[sink]) as watcher:
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        watcher.flush()
        assert seen == []
        assert not sink.flush(0.01)
        go.set()
        assert sink.flush()
        assert seen == [1]


@pytest.mark.slow
def test_a_program_that_never_closes_delivers(tmp_path):
    """All steps arrive also when the interpreter exits with an open watcher."""
    done = processes.run(
        code="""
        import torch, gradwatch
        from gradwatch_loggers import ScalarSink

        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sink = ScalarSink(lambda step, scalars: print(step, flush=True))
        gradwatch.watch(model, optimizer, sinks=[sink]).attach()
        for _ in range(5):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        """
    )
    assert done.stdout.split() == ["1", "2", "3", "4", "5"]
    assert done.returncode == 0


def test_it_can_be_pickled_before_the_first_step(train):
    """A sink that goes to another process with the options works there."""
    _called.clear()
    train(pickle.loads(pickle.dumps(ScalarSink(_function))), steps=3)
    assert _called == [1, 2, 3]


_called = []


def _function(step, scalars):
    _called.append(step)


def test_wrong_arguments_are_refused():
    """Each error names the argument, what it got and what to write."""
    with pytest.raises(TypeError, match=r"ScalarSink\(function\) must be a function of \(step, sc"):
        ScalarSink("log")
    with pytest.raises(
        TypeError, match=r"cannot be called as function\(step, scalars\).*Write lam"
    ):
        ScalarSink(lambda scalars: None)
    with pytest.raises(TypeError, match=r"ScalarSink\(background=\) must be True or False, got 1"):
        ScalarSink(_function, background=1)
    with pytest.raises(TypeError, match=r"ScalarSink\(blocks=\) must be True or False"):
        ScalarSink(_function, blocks="all")
    with pytest.raises(ValueError, match=r'ScalarSink\(deliver=\) must be "batch" or "step", got'):
        ScalarSink(_function, deliver="epoch")
    with pytest.raises(TypeError, match=r"ScalarSink\(deliver=\) must be"):
        ScalarSink(_function, deliver=1)
    with pytest.raises(ValueError, match=r"most_waiting=\) must be at least 1, got 0"):
        ScalarSink(_function, most_waiting=0)
    with pytest.raises(TypeError, match=r"most_waiting=\) must be a whole number"):
        ScalarSink(_function, most_waiting=True)
    for wrong in (-1, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"wait_s=\) must be at least 0 and finite"):
            ScalarSink(_function, wait_s=wrong)
    with pytest.raises(TypeError, match=r"wait_s=\) must be a number of seconds"):
        ScalarSink(_function, wait_s="long")


def test_a_closed_sink_says_so(train):
    """It does not take a second run."""
    sink = ScalarSink(_function)
    train(sink, steps=1)
    with pytest.warns(gradwatch.GradwatchWarning, match="ScalarSink is closed"):
        train(sink, steps=1)

"""LogSink: a readable line per 50 steps, and events at once."""

import logging
import math

import numpy as np
import pytest
import torch

import gradwatch
from gradwatch import Event, Layout, RecordBatch, StepRecord
from gradwatch_loggers import LogSink


def lines(caplog, name="gradwatch.steps"):
    """The messages of a logger."""
    return [one.getMessage() for one in caplog.records if one.name == name]


def batch(*records, events=()):
    """A batch of steps, without parameters."""
    empty = np.empty((len(records), 0))
    return RecordBatch(Layout((), ()), list(records), empty, empty, events=events)


def own(*handlers):
    """A logger that nobody else knows of."""
    logger = logging.getLogger(f"own-{len(handlers)}")
    logger.propagate, logger.handlers = False, list(handlers)
    logger.setLevel(logging.INFO)
    return logger


@pytest.fixture
def info(caplog):
    """Listens to INFO."""
    caplog.set_level(logging.INFO, logger="gradwatch")
    return caplog


def test_a_line_per_50_steps_and_one_at_the_end(train, info):
    """There is one at each multiple of 50, and one for the rest, with the numbers of the newest step."""
    watcher, _ = train(LogSink(), steps=120, clip=0.08)
    found = lines(info)
    assert [one.split(":")[0] for one in found] == [f"gradwatch step {n}" for n in (50, 100, 120)]
    rows = watcher.history.steps()
    row = rows.loc[100]
    part = rows.loc[51:100]
    assert f"norm {row['grad_norm']:.4g}" in found[1]
    assert f"50 steps: largest norm {part['grad_norm'].max():.4g}" in found[1]
    clipped = int(part["clipped"].sum())
    assert f"{clipped} clipped ({clipped / 50:.0%}".replace("%", " %)") in found[1]
    assert f"lr {row['lr']:.3g}" in found[1]
    assert "20 steps: " in found[2]


def test_what_a_line_says():
    """Norm before and after the clip, clip rate, skips, micro-batches, noise scale, loss and rate."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append((record.levelname, record.getMessage()))
    sink = LogSink(2, logger=own(handler))
    first = StepRecord(1, "SGD", grad_norm=math.nan, outcome="skipped_nonfinite", clipped=None)
    second = StepRecord(
        2, "SGD", micro_batches=4, grad_norm=8.125, grad_norm_clipped=1.0, clipped=True, loss=2.5,
        lr=3e-4, noise_scale=812.0, noise_scale_stderr=10.0, global_step=1_002,
    )  # fmt: skip
    sink.write(batch(first, second))
    sink.close()
    rest = "2 steps: largest norm 8.125, 1 clipped (50 %), 1 skipped, 4 micro-batches, "
    rest += "noise scale 812, loss 2.5, lr 0.0003"
    assert said == [
        (
            "INFO",
            f"gradwatch step 1,002: norm 8.125, clipped to 1 | {rest}",
        )
    ]


def test_events_are_told_at_once_as_warnings(train, info):
    """A NaN has its line before the next step, with what was done about it, and is counted later."""

    def look(step):
        if step == 4:
            (told,) = [one for one in info.records if one.name == "gradwatch.steps"]
            assert told.levelno == logging.WARNING
            assert told.getMessage().startswith("gradwatch step 3: NaN in the gradient of 2.bias")
            assert told.getMessage().endswith("not applied (skipped_nonfinite): weights and "
                                              "optimizer state are as before. [1 nan so far, "
                                              "1 skipped so far]")  # fmt: skip

    train(LogSink(), steps=10, nan_at=(3,), before_step=look)
    assert "1 skipped" in lines(info)[-1]
    assert lines(info)[-1].endswith("events: 1 nan, 1 skipped")


def test_many_events_of_a_kind_are_thinned_out(info):
    """The first five have a line each, then the 10th, 20th, 40th; all are counted."""
    sink = LogSink(1000)
    for step in range(1, 101):
        event = Event(step, 1, "nan", "p", "", 1.0, 0, "bad", optimizer="SGD", global_step=step)
        sink.write(batch(StepRecord(step, "SGD", global_step=step), events=[event]))
    sink.close()
    told = [int(one.split(":")[0].split()[-1]) for one in lines(info)]
    assert told == [1, 2, 3, 4, 5, 10, 20, 40, 80, 100]
    assert lines(info)[-1].endswith("events: 100 nan")


def test_several_optimizers_are_named(info):
    """Each has lines of its own."""
    sink = LogSink(2)
    for step in (1, 2):
        for name in ("D", "G"):
            sink.write(batch(StepRecord(step, name, grad_norm=step, global_step=step)))
    assert [one.split(": ")[0] for one in lines(info)] == [
        "gradwatch step 2 of D",
        "gradwatch step 2 of G",
    ]


def test_several_models_are_named(info):
    """Of the models that watch_all() finds each line names its own."""
    with gradwatch.watch_all(sinks=lambda name: [LogSink(2)]):
        for width in (2, 3):
            model = torch.nn.Linear(width, 1)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(2):
                model(torch.ones(1, width)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
    assert [one.split(":")[0] for one in lines(info)] == [
        "gradwatch step 2 of Linear",
        "gradwatch step 2 of Linear-1",
    ]


def test_an_own_logger_and_level(train, caplog):
    """Lines go where the user says, at the level that he says."""
    caplog.set_level(logging.DEBUG, logger="mine")
    train(LogSink(10, logger="mine", level=logging.DEBUG), steps=10)
    assert [one.levelno for one in caplog.records if one.name == "mine"] == [logging.DEBUG]


def test_a_level_that_shows_nothing_is_told(train, caplog):
    """If the program's logging hides the lines, a warning says what to write, once."""
    with pytest.warns(
        gradwatch.GradwatchWarning, match=r"shows WARNING and above only. Write"
    ) as w:
        train(LogSink(5), steps=20)
    assert len(w) == 1
    assert lines(caplog) == []


def test_without_logging_lines_go_to_stderr(train, capsys):
    """A program that has set up no logging sees them all the same."""
    train(LogSink(2, logger=own()), steps=4)
    shown = capsys.readouterr().err.splitlines()
    assert [one.split(":")[0] for one in shown] == ["gradwatch step 2", "gradwatch step 4"]


def test_wrong_arguments_are_refused():
    """Each error names the argument and what to write."""
    with pytest.raises(ValueError, match=r"LogSink\(every=\) must be at least 1, got 0. Write 50"):
        LogSink(0)
    with pytest.raises(TypeError, match=r"LogSink\(every=\) must be a whole number, got 2.5 of ty"):
        LogSink(2.5)
    with pytest.raises(TypeError, match=r"LogSink\(logger=\) must be a logger or its name, got 3"):
        LogSink(logger=3)
    with pytest.raises(
        TypeError, match=r"LogSink\(level=\) must be a level of logging, got 'INFO'"
    ):
        LogSink(level="INFO")

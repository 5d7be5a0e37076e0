"""Advice about a clip that acts nearly always, or never."""

import math

import numpy as np
import pytest

from gradwatch import History
from gradwatch.record.records import Layout, RecordBatch, StepRecord


def _history(steps):
    none = np.empty((len(steps), 0))
    batch = RecordBatch(Layout((), ()), steps, none, none)
    return History(lambda: batch)


def _steps(clipped, norm=2.0, threshold=1.0, optimizer="Adam", outcome="applied"):
    return [
        StepRecord(
            step=number + 1,
            optimizer=optimizer,
            grad_norm=norm,
            clipped=is_clipped,
            clip_threshold=threshold,
            outcome=outcome,
        )
        for number, is_clipped in enumerate(clipped)
    ]


def test_rate_is_over_the_newest_applied_steps():
    """Older steps and steps that were not applied do not count."""
    steps = _steps([True] * 50 + [False] * 75 + [True] * 25)
    skipped = _steps([True] * 500, outcome="skipped_nonfinite")
    assert _history([*steps, *skipped]).clip_rate(window=100) == 0.25
    assert math.isnan(_history(skipped).clip_rate())


def test_a_clip_that_acts_on_most_steps_is_too_tight():
    """The line names the rate, the limit and the norm to raise it to."""
    (line,) = _history(_steps([True] * 600 + [False] * 400)).advice()
    assert "60% of the last 1,000 steps" in line
    assert "limit is 1" in line
    assert "below 2" in line


def test_a_clip_that_never_acts_is_told_of():
    """So that nobody believes to be protected by a limit far away."""
    (line,) = _history(_steps([False] * 200, threshold=100.0)).advice()
    assert "none of the last 200 steps" in line
    assert "largest norm was 2" in line


@pytest.mark.parametrize(
    "steps",
    [
        _steps([True] * 99),
        _steps([True] * 50 + [False] * 50),
        _steps([False] * 500, threshold=math.nan),
        _steps([False] * 499 + [True], threshold=5.0),
    ],
    ids=["too few", "half", "no clip", "once"],
)
def test_otherwise_nothing_is_said(steps):
    """Too few steps, half of them clipped, no clip at all, or a rare one: no advice."""
    assert _history(steps).advice() == []


def test_each_optimizer_has_a_line_of_its_own():
    """One is clipped always, the other as it should."""
    mixed = [
        *_steps([True] * 200, optimizer="Adam"),
        *_steps([False] * 199 + [True], optimizer="SGD"),
    ]
    (line,) = _history(mixed).advice()
    assert line.startswith("Adam:")

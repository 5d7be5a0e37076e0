"""Runs made by hand: a history of the given numbers, and nothing else in it."""

import math

import numpy as np
import pytest

from gradwatch import History
from gradwatch.record.records import NO_GRADIENT, Layout, RecordBatch, StepRecord


def _per_step(value, number):
    return value[number] if isinstance(value, (list, tuple, np.ndarray)) else value


def _layout(names, shapes):
    modules = tuple(name.rpartition(".")[0] for name in names)
    return Layout(tuple(names), modules, tuple(shapes), ((),) * len(names))


@pytest.fixture
def history():
    """Makes a history of columns: numbers for all steps, or one for each."""

    def make(
        count=200,
        *,
        names=("a.weight", "b.weight"),
        shapes=None,
        norms=None,
        statistics=None,
        events=(),
        first=1,
        **columns,
    ):
        columns = {"grad_norm": 1.0, "optimizer": "SGD", "lr": 0.1} | columns
        steps = [
            StepRecord(
                step=first + number,
                **{name: _per_step(value, number) for name, value in columns.items()},
            )
            for number in range(count)
        ]
        shapes = shapes or [(8, 8)] * len(names)
        rows = np.ones((count, len(names))) if norms is None else np.array(norms, float)
        rows = np.broadcast_to(rows, (count, len(names)))
        rows = np.where(np.isnan(rows), NO_GRADIENT, rows)
        planes = {
            name: np.broadcast_to(np.array(plane, float), rows.shape)
            for name, plane in (statistics or {}).items()
        }
        batch = RecordBatch(_layout(names, shapes), steps, rows, rows, planes, tuple(events))
        return History(lambda: batch)

    return make


@pytest.fixture
def kinds(history):
    """Makes a history and returns the kinds of what its report finds."""
    return lambda *args, **columns: history(*args, **columns).report().kinds


@pytest.fixture
def nan():
    """Returns a NaN."""
    return math.nan

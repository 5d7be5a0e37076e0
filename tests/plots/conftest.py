"""Runs made by hand, and figures that are closed after each test."""

import matplotlib as mpl
import numpy as np
import pytest

from gradwatch import History
from gradwatch.record.records import NO_GRADIENT, Layout, RecordBatch, StepRecord

mpl.use("Agg")


@pytest.fixture(autouse=True)
def _matplotlib_as_it_comes():
    """Whatever the matplotlibrc of this home says; figures are closed after the test."""
    from matplotlib import pyplot as plt

    with mpl.rc_context():
        mpl.rcdefaults()
        yield
        plt.close("all")


def _at(value, number):
    return value[number] if isinstance(value, (list, tuple, np.ndarray)) else value


@pytest.fixture
def history():
    """Makes a history of columns, numbers for all steps or one for each; NaN norms: no gradient."""

    def make(count=100, names=("a.weight", "a.bias"), norms=None, events=(), **columns):
        columns = {"grad_norm": 1.0, "optimizer": "SGD"} | columns
        columns = {"grad_norm_clipped": columns["grad_norm"]} | columns
        steps = [
            StepRecord(
                step=columns.get("step", range(1, count + 1))[place],
                **{name: _at(of, place) for name, of in columns.items() if name != "step"},
            )
            for place in range(count)
        ]
        rows = np.ones((count, len(names))) if norms is None else np.array(norms, float)
        rows = np.broadcast_to(rows, (count, len(names)))
        rows = np.where(np.isnan(rows), NO_GRADIENT, rows)
        shapes = tuple((3,) if name.endswith("bias") else (3, 3) for name in names)
        modules = tuple(name.rpartition(".")[0] for name in names)
        layout = Layout(tuple(names), modules, shapes, ((),) * len(names))
        batch = RecordBatch(layout, steps, rows, rows, {}, tuple(events))
        return History(lambda: batch)

    return make


@pytest.fixture
def drawn():
    """Draws axes, so that every tick has its text, and returns them."""

    def draw(ax):
        ax.figure.canvas.draw()
        return ax

    return draw

"""Made-up runs, what a folder must say of them, and processes that write them."""

import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from gradwatch.history import History, load
from gradwatch.record.folder.writer import RunFolder
from gradwatch.record.recorder import Entry, RingBuffer
from gradwatch.record.records import Event, Layout, RecordBatch, StepRecord
from tests.support import processes


def layout(*names):
    """Parameters of these names."""
    return Layout(
        names,
        tuple(name.rpartition(".")[0] for name in names),
        ((2, 3),) * len(names),
        ((),) * len(names),
    )


ABC = layout("a", "b", "c")


def batch(steps, parameters=ABC, optimizer="SGD", events=(), **more):
    """Some steps whose norms tell where they belong: 1000 * place + step."""
    records = [StepRecord(step=step, optimizer=optimizer, **more) for step in steps]
    norms = np.array(
        [[1000.0 * place + step for place in range(len(parameters.names))] for step in steps],
        np.float32,
    ).reshape(len(records), len(parameters.names))
    return RecordBatch(parameters, records, norms, norms.copy(), events=tuple(events))


def event(step, optimizer="SGD", kind="nan", value=1.0):
    """An event of a step."""
    return Event(step, 1, kind, "a", "", value, 0, f"at {step}", optimizer=optimizer)


def write(path, *batches, close=True):
    """Writes batches as one session."""
    sink = RunFolder(path)
    for one in batches:
        sink.write(one)
    if close:
        sink.close()
    return sink


def live(*batches, size=100_000):
    """The live history of the same steps."""
    buffer = RingBuffer(batches[0].layout, size)
    for one in batches:
        for place, record in enumerate(one.steps):
            statistics = {name: plane[place] for name, plane in one.statistics.items()}
            columns = range(len(one.layout.names))
            norms, clipped = one.norms[place], one.clipped_norms[place]
            buffer.append(Entry(record, columns, norms, columns, clipped, statistics))
    events = tuple(event for one in batches for event in one.events)
    return History(lambda: buffer.batch(events=events))


def assert_same(one, other):
    """The frames are equal: columns, dtypes, order and every bit of every number."""
    for name in ("steps", "parameters", "events"):
        left, right = getattr(one, name)(), getattr(other, name)()
        pd.testing.assert_frame_equal(left, right, check_exact=True, check_freq=False)
        for column in left.columns:
            if left[column].dtype.kind == "f":
                left_bits, right_bits = (frame[column].to_numpy() for frame in (left, right))
                finite = ~np.isnan(left_bits)
                assert left_bits[finite].tobytes() == right_bits[finite].tobytes()


def steps_of(path):
    """The steps that a folder gives."""
    return load(path).steps().index.tolist()


def child(code, *arguments, **options):
    """Starts Python on some code that finds this module as `runs`."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    here = Path(__file__).parent
    path = [here, here.parents[2]]  # for `runs`, and for the `tests` that it imports
    environment = processes.environment(path, HOME=tempfile.gettempdir())
    return processes.start(*arguments, code=code, env=environment, **pipes, **options)


def assert_consistent(path, least=0):
    """No step twice, none missing, each with its numbers; at least so many."""
    history = load(path)
    steps = history.steps()
    assert steps.index.tolist() == list(range(1, len(steps) + 1))
    assert len(steps) >= least
    parameters = history.parameters(stop=len(steps) + 1)
    assert len(parameters) == len(steps) * len(history.names)
    places = {name: place for place, name in enumerate(history.names)}
    place = np.array([places[name] for name in parameters["parameter"]], float)
    expected = place * 1000.0 + parameters["step"]
    assert (parameters["grad_norm"] == expected).all()
    return len(steps)

"""Batches made by hand, and event files read back with TensorBoard's own readers."""

import itertools
import math
import re
from collections import Counter

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from gradwatch.record.records import NO_GRADIENT, Event, Layout, RecordBatch, StepRecord


class Run:
    """Makes batches of one run whose numbers follow from the step: norm = step / 10."""

    def __init__(self, modules=("encoder", "encoder", "head")):
        names = tuple(f"{module}.p{i}" for i, module in enumerate(modules))
        self.layout = Layout(names, tuple(modules))

    def record(self, step, **fields):
        norm = fields.setdefault("grad_norm", step / 10)
        coef = fields.setdefault("clip_coef", 0.5)
        fields.setdefault("grad_norm_clipped", coef * norm)
        fields.setdefault("global_step", step)
        return StepRecord(step=step, time_s=step / 100, **{"optimizer": "AdamW", **fields})

    def batch(self, records, events=(), norms=None):
        if isinstance(records, range):
            records = [self.record(step) for step in records]
        if norms is None:
            share = 1 / math.sqrt(len(self.layout.names))
            norms = [[r.grad_norm * share] * len(self.layout.names) for r in records]
        norms = np.array(norms, dtype=np.float32).reshape(len(records), -1)
        return RecordBatch(self.layout, records, norms, norms, events=events)

    def nan_step(self, step, **fields):
        """One step whose first parameter is NaN, with the event that belongs to it."""
        record = self.record(
            step, grad_norm=math.nan, grad_norm_clipped=math.nan, nonfinite_parameters=1, **fields
        )
        norms = [[math.nan, *[0.5] * (len(self.layout.names) - 1)]]
        return self.batch([record], [self.event(step, **fields)], norms)

    def event(self, step, kind="nan", message="3 NaN elements", **fields):
        fields = {"parameter": self.layout.names[0], "optimizer": "AdamW", **fields}
        fields.setdefault("global_step", step)
        return Event(
            step=step, micro_batch=1, kind=kind, module="", value=3.0, rank=0,
            message=message, **fields,
        )  # fmt: skip

    no_gradient = NO_GRADIENT


class Reader:
    """What the event files in a folder hold."""

    def __init__(self, folder):
        self.files = sorted(folder.glob("*tfevents*"))
        self._accumulator = EventAccumulator(
            str(folder), size_guidance={"scalars": 0, "tensors": 0}
        ).Reload()

    def tags(self):
        return self._accumulator.Tags()["scalars"]

    def series(self, tag):
        return [(event.step, event.value) for event in self._accumulator.Scalars(tag)]

    def steps(self, tag):
        return [step for step, _ in self.series(tag)]

    def values(self, tag):
        return [value for _, value in self.series(tag)]

    def wall_times(self, tag):
        return [event.wall_time for event in self._accumulator.Scalars(tag)]

    def texts(self):
        tag = "gradwatch/events/text_summary"
        if tag not in self._accumulator.Tags()["tensors"]:
            return []
        events = self._accumulator.Tensors(tag)
        return [(e.step, e.tensor_proto.string_val[0].decode()) for e in events]

    def tensor_tags(self):
        return self._accumulator.Tags()["tensors"]

    def raw_events(self):
        """All events of all files, as they stand there."""
        return list(
            itertools.chain.from_iterable(EventFileLoader(str(f)).Load() for f in self.files)
        )

    def scalar_events_per_step(self):
        steps = (
            event.step
            for event in self.raw_events()
            if any(value.tag.startswith("gradwatch") and value.metadata.plugin_data.plugin_name
                   in ("", "scalars") and value.tag.count("/") == 1  # more: of the Gradients tab
                   for value in event.summary.value)
        )  # fmt: skip
        return Counter(steps)


@pytest.fixture
def run():
    """A run of a model of two modules."""
    return Run()


@pytest.fixture(scope="session")
def make_run():
    """Makes a run of a model of any modules."""
    return Run


@pytest.fixture
def read():
    """Reads a folder's event files."""
    return Reader


@pytest.fixture(scope="session")
def age():
    """Makes a folder's files a second older by their names, in whose order they are read."""

    def rename(folder):
        for file in sorted(folder.glob("events.out.tfevents.*")):
            start, second, rest = re.fullmatch(r"(\D+)(\d+)(\..*)", file.name).groups()
            file.rename(folder / f"{start}{int(second) - 1:010d}{rest}")

    return rename

"""Runs made by hand, and what the event files hold of them, put together again."""

import itertools
import json
import math
from dataclasses import dataclass

import numpy as np
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util import tensor_util

from gradwatch.record.records import Event, Layout, RecordBatch, StepRecord
from gradwatch_dashboard.wire import COLUMNS, StreamLayout, Tag
from gradwatch_tensorboard import TensorBoardWriter


def layout_of(parameters):
    """A model of so many parameters, two in each module."""
    names = tuple(f"layers.{i // 2}.{('weight', 'bias')[i % 2]}" for i in range(parameters))
    modules = tuple(name.rpartition(".")[0] for name in names)
    return Layout(names, modules, tuple((i + 1, 2) for i in range(parameters)))


def batch(steps, norms, optimizer="AdamW", layout=None, events=(), offset=0, **fields):
    """Steps with given rows of norms; their total is that of the finite ones."""
    norms = np.asarray(norms)
    layout = layout or layout_of(norms.shape[1])
    records = []
    for step, row in zip(steps, norms, strict=True):
        finite = bool(np.isfinite(row).all())
        total = (
            float(np.sqrt((np.maximum(row, 0).astype(float) ** 2).sum())) if finite else math.nan
        )
        values = {"grad_norm": total, "grad_norm_clipped": total / 2, "clip_coef": 0.5,
                  "clip_threshold": 1.0, "clipped": True, "global_step": step + offset,
                  "nonfinite_parameters": int((~np.isfinite(row)).sum()), **fields}  # fmt: skip
        records.append(StepRecord(step=step, optimizer=optimizer, time_s=step / 100, **values))
    return RecordBatch(layout, records, norms, norms, events=events)


def event(step, kind="nan", optimizer="AdamW", **fields):
    """One event; all that is not said is made up."""
    fields = {"micro_batch": 1, "parameter": "layers.0.weight", "module": "layers.0", "value": 3.0,
              "rank": 0, "message": "3 of 8 elements are NaN.", "nan_count": 3, "global_step": step,
              **fields}  # fmt: skip
    return Event(step=step, kind=kind, optimizer=optimizer, **fields)


def rows(steps, parameters):
    """Norms from which the step and the parameter can be told: step + parameter / 1024."""
    return np.asarray(list(steps))[:, None] + np.arange(parameters, dtype=np.float32) / 1024


def write(folder, *batches, **options):
    """Writes a whole run, the matrix alone unless said otherwise."""
    options = {"step_scalars": False, "block_every": 10**6, "layout": False, **options}
    writer = TensorBoardWriter(folder, **options)
    for one in batches:
        writer.write(one)
    writer.close()


def raw_events(folder):
    """All Events of all files of a folder, as they stand there."""
    files = sorted(folder.glob("*tfevents*"))
    return list(itertools.chain.from_iterable(EventFileLoader(str(f)).Load() for f in files))


def our_values(event):
    """The values of an Event that the Gradients tab reads."""
    return [value for value in event.summary.value if value.WhichOneof("value") == "tensor"
            and Tag.parse(value.tag) and "text_summary" not in value.tag]  # fmt: skip


@dataclass
class Stream:
    """One stream: all chunks of all its segments, one after another."""

    session: str
    number: int
    layout: StreamLayout
    norms: np.ndarray
    bad: np.ndarray
    table: np.ndarray
    chunks: list

    def column(self, name):
        """A column of the table."""
        return self.table[:, COLUMNS.index(name)]

    def steps(self):
        """Every step that a window covers, in their order."""
        spans = zip(self.column("first_step"), self.column("last_step"), strict=True)
        return [step for first, last in spans for step in range(int(first), int(last) + 1)]


def streams(tensors):
    """Puts the tensors of a run together; fails where the tags of a chunk do not fit together."""
    found = []
    for tag in sorted(tag for tag in tensors if tag.kind == "layout"):
        ((_, layout),) = tensors[tag]
        layout = StreamLayout.from_json(layout.item())
        segments = sorted(
            other for other in tensors
            if other.kind == "norms" and other[1:3] == tag[1:3] and tensors[other]
        )  # fmt: skip
        chunks, parts = [], {"norms": [], "bad": [], "steps": []}
        for segment in segments:
            series = {kind: tensors[segment._replace(kind=kind)] for kind in parts}
            steps = [[step for step, _ in points] for points in series.values()]
            assert steps[0] == steps[1] == steps[2]
            assert steps[0] == sorted(set(steps[0]))
            assert 1 <= len(steps[0]) <= 100
            chunks += [len(array) for _, array in series["norms"]]
            for norms, bad, table in zip(*series.values(), strict=True):
                assert norms[1].dtype == np.float32
                assert bad[1].dtype == np.uint16
                assert table[1].dtype == np.float64
                assert len(norms[1]) == len(table[1])
                empty = len(bad[1]) == 0
                parts["norms"].append(norms[1])
                parts["bad"].append(np.zeros(norms[1].shape, np.uint16) if empty else bad[1])
                parts["steps"].append(table[1])
        arrays = [np.concatenate(part) if part else np.empty((0, 0)) for part in parts.values()]
        found.append(Stream(tag.session, tag.stream, layout, *arrays, chunks))
    return found


def events(tensors):
    """The entries of all sessions, oldest first."""
    tags = sorted(tag for tag in tensors if tag.kind == "events")
    return [json.loads(text) for tag in tags for _, array in tensors[tag] for text in array]


def tensors(folder):
    """Tag to the steps and arrays of its points, as they stand in the files."""
    found = {}
    for event in raw_events(folder):
        for value in our_values(event):
            array = tensor_util.make_ndarray(value.tensor)
            found.setdefault(Tag.parse(value.tag), []).append((event.step, array))
    return found

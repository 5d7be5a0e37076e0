"""Event files as the writer leaves them, and damaged ones: streams by the wire format."""

import itertools
import json
import struct
import time
from pathlib import Path

import numpy as np
from tensorboard.compat.proto import event_pb2, summary_pb2, types_pb2
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from gradwatch_dashboard.wire import COLUMNS, PLUGIN, StreamLayout, Tag, plugin_content

_TYPES = {"f4": types_pb2.DT_FLOAT, "f8": types_pb2.DT_DOUBLE, "u2": types_pb2.DT_UINT16,
          "i4": types_pb2.DT_INT32}  # fmt: skip
_files = itertools.count()


class LogFile:
    """An event file of a run.

    Args:
        folder: Folder of the run; made if need be.
    """

    def __init__(self, folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{next(_files):06d}.test"
        self._file = (Path(folder) / name).open("wb")
        self._write(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        self._file.close()

    def _write(self, event):
        data = event.SerializeToString()
        head = struct.pack("<Q", len(data))
        self._file.write(head + struct.pack("<I", masked_crc32c(head)))
        self._file.write(data + struct.pack("<I", masked_crc32c(data)))
        self._file.flush()

    def add(self, step, values, content=None, plugin=PLUGIN, wall_time=None):
        """Writes tag -> array, text, list of texts, or a TensorProto, as one Event."""
        event = event_pb2.Event(step=step, wall_time=wall_time or time.time())
        for tag, value in values.items():
            item = event.summary.value.add(tag=str(tag))
            item.metadata.data_class = summary_pb2.DATA_CLASS_TENSOR
            item.metadata.plugin_data.plugin_name = plugin
            item.metadata.plugin_data.content = plugin_content() if content is None else content
            fill(item.tensor, value)
        self._write(event)

    def add_layout(self, session, optimizer, parameters, stream=0, shapes=(), step=1, columns=()):
        """Writes the layout of a stream."""
        modules = tuple(name.rpartition(".")[0] for name in parameters)
        layout = StreamLayout(optimizer, tuple(parameters), modules, tuple(shapes), tuple(columns))
        self.add(step, {Tag("layout", session, stream): layout.to_json()})

    def add_windows(self, session, norms, steps, bad=None, stream=0, segment=0, further=None):
        """Writes a chunk: norms ``[W, P]``, steps a table or (first steps, last steps)."""
        norms = np.asarray(norms, "f4")
        table = table_of(*steps, norms) if isinstance(steps, tuple) else np.asarray(steps, "f8")
        if further is not None:
            table = np.hstack([table, np.asarray(further, "f8")])
        if bad is None:
            bad = (~np.isfinite(norms)).astype("u2")
        bad = np.asarray(bad, "u2")
        last = table[0, 0] if len(table) and np.isfinite(table[0, 0]) else 1
        self.add(
            int(last),
            {
                Tag("norms", session, stream, segment): norms,
                Tag("bad", session, stream, segment): bad if bad.any() else bad[:0],
                Tag("steps", session, stream, segment): table,
            },
        )

    def add_events(self, session, events, step=1):
        """Writes events, each a dict or a text."""
        texts = [event if isinstance(event, str) else json.dumps(event) for event in events]
        self.add(step, {Tag("events", session): texts})


def fill(tensor, value):
    """Puts a value into a tensor message."""
    if isinstance(value, type(tensor)):
        tensor.CopyFrom(value)
        return
    tensor.tensor_shape.SetInParent()
    if isinstance(value, (str, bytes, list)):
        tensor.dtype = types_pb2.DT_STRING
        items = value if isinstance(value, list) else [value]
        tensor.string_val.extend(item.encode() if isinstance(item, str) else item for item in items)
        if isinstance(value, list):
            tensor.tensor_shape.dim.add(size=len(value))
        return
    tensor.dtype = _TYPES[value.dtype.str[1:]]
    tensor.tensor_content = value.tobytes()
    for size in value.shape:
        tensor.tensor_shape.dim.add(size=size)


def table_of(first_steps, last_steps, norms):
    """The steps table of windows, with totals that follow from their norms."""
    first_steps, last_steps = np.asarray(first_steps, "f8"), np.asarray(last_steps, "f8")
    table = np.zeros((len(first_steps), len(COLUMNS)))
    with np.errstate(invalid="ignore", over="ignore"):
        total = np.sqrt(np.square(np.maximum(norms, 0, dtype="f8")).sum(1))
    columns = {
        "first_step": first_steps,
        "last_step": last_steps,
        "global_step": last_steps,
        "wall_time": 1.7e9 + last_steps,
        "grad_norm": total,
        "grad_norm_clipped": np.minimum(total, 1.0),
        "clip_threshold": np.ones(len(table)),
        "clip_coef": np.minimum(1.0, 1.0 / np.maximum(total, 1e-12)),
        "bad_steps": (~np.isfinite(norms)).any(1),
        "clipped_steps": total > 1.0,
        "skipped_steps": (~np.isfinite(norms)).any(1),
    }
    for name, values in columns.items():
        table[:, COLUMNS.index(name)] = values
    return table


def event(step, kind="nan", optimizer="AdamW", **fields):
    """The fields of an event."""
    return {
        "step": step, "micro_batch": 1, "kind": kind, "parameter": "", "module": "", "value": 1.0,
        "rank": 0, "message": f"{kind} in step {step}", "nan_count": 1, "inf_count": 0,
        "optimizer": optimizer, "global_step": step, **fields,
    }  # fmt: skip


def write_run(folder, session="018000000001", optimizer="AdamW", parameters=("a.weight", "b.bias"),
              first=1, last=100, chunk=10, nan_steps=(), scale=1.0, seed=0):  # fmt: skip
    """Writes a run of windows of one step; returns its norms ``[steps, P]``."""
    rng = np.random.default_rng(seed)
    norms = rng.uniform(0.1, 1.0, (last - first + 1, len(parameters))).astype("f4") * scale
    for step in nan_steps:
        norms[step - first] = np.nan
    with LogFile(folder) as log:
        log.add_layout(session, optimizer, parameters, step=first)
        for number, start in enumerate(range(0, len(norms), chunk)):
            rows = norms[start : start + chunk]
            steps = np.arange(first + start, first + start + len(rows))
            log.add_windows(session, rows, (steps, steps), segment=number // 100)
    return norms

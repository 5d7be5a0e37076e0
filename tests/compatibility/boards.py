"""A TensorBoard log as gradwatch writes it, and what TensorBoard and the Gradients tab say of it."""

import json
import struct
import warnings

import numpy as np
from werkzeug.test import Client

import gradwatch
from gradwatch_tensorboard import TensorBoardWriter

from .told import told, told_array
from .trainings import make_model, make_optimizers, managed_steps

with warnings.catch_warnings():
    # TensorBoard's own copy of html5lib says at its import that it is old.
    warnings.simplefilter("ignore", DeprecationWarning)
    import tensorboard.plugin_util  # noqa: F401
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.plugins import base_plugin
    from tensorboard.util import tensor_util

    from gradwatch_dashboard import GradientsLoader

ALL = {"scalars": 0, "tensors": 0}
NEUTRAL_NAME = "events.out.tfevents.1700000000.host.1.0"
STEPS = 66
OPTIMIZERS = ("SGD", "Adam")


def write_log(folder):
    """Writes the log of a training with accumulation, a clip and poisoned steps."""
    model = make_model()
    optimizers = make_optimizers(model)
    with gradwatch.watch(
        model, optimizers, clip=0.4, accumulate=3, on_nonfinite="skip",
        sinks=[TensorBoardWriter(folder, every=6, block_every=30)],
    ) as watcher:  # fmt: skip
        managed_steps(watcher, model, range(STEPS), bad={9, 50})
    (file,) = folder.iterdir()
    file.rename(folder / NEUTRAL_NAME)  # it has the name of the machine in it


def answers_of(logdir):
    """What TensorBoard reads of the run, and what the tab answers."""
    return {"tags": _tags_of(logdir / "run"), "tab": _answers_of_the_tab(logdir)}


def _tags_of(folder):
    accumulator = EventAccumulator(str(folder), size_guidance=ALL).Reload()
    tags = accumulator.Tags()
    scalars = {
        tag: [[event.step, told(np.float32(event.value))] for event in accumulator.Scalars(tag)]
        for tag in sorted(tags["scalars"])
    }
    tensors = {
        tag: [[event.step, _tensor(event.tensor_proto)] for event in accumulator.Tensors(tag)]
        for tag in sorted(tags["tensors"])
    }
    return {"scalars": scalars, "tensors": tensors}


def _tensor(proto):
    array = tensor_util.make_ndarray(proto)
    if array.dtype == object:
        return [text.decode("latin-1") for text in array.flatten().tolist()]
    return [str(array.dtype), list(array.shape), told_array(array.flatten())]


def _answers_of_the_tab(logdir):
    multiplexer = EventMultiplexer(tensor_size_guidance={"gradwatch": 0})
    multiplexer.AddRunsFromDirectory(str(logdir))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, "logs")
    context = base_plugin.TBContext(data_provider=provider)
    apps = GradientsLoader().load(context).get_plugin_apps()

    def get(route, **query):
        reply = Client(apps[f"/{route}"]).get("/", query_string=query)
        assert reply.status_code == 200, reply.get_data(as_text=True)
        return reply.get_data()

    answers = {"runs": json.loads(get("runs")), "events": json.loads(get("events", run="run"))}
    for optimizer in OPTIMIZERS:
        query = {"run": "run", "optimizer": optimizer}
        answers[optimizer] = {
            "layout": json.loads(get("layout", **query)),
            "heatmap": _unpacked(get("heatmap", **query)),
            "curve": json.loads(get("curve", parameter=1, **query)),
        }
    return told(answers)


def _unpacked(body):
    """Reads a binary answer: its header, with the arrays by name."""
    (size,) = struct.unpack_from("<I", body)
    header = json.loads(body[4 : 4 + size])
    arrays, position = {}, 4 + size
    for entry in header["arrays"]:
        dtype = np.dtype(entry["dtype"]).newbyteorder("<")
        count = int(np.prod(entry["shape"], dtype=np.int64))
        arrays[entry["name"]] = told_array(np.frombuffer(body, dtype, count, position))
        position = -(-(position + count * dtype.itemsize) // 8) * 8
    return header | arrays

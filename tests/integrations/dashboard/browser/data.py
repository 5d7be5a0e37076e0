"""Runs with numbers that the tests know."""

import numpy as np
from tensorboard.compat.proto import event_pb2
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from tests.integrations.dashboard.logs import LogFile, event

HOSTILE_RUN = "<img src=x onerror=alert(1)>"
HOSTILE = [
    "<script>alert(1)</script>.weight",
    'x"><img src=x onerror=alert(2)>',
    "javascript:alert(3)",
    "evil\u202etxet\nline",
]
HOSTILE_MESSAGE = "<b onmouseover=alert(4)>bold</b> ${alert(5)}"

RUNS = 5
STEPS = 300
NAN_STEP, INF_STEP, SPIKE = 120, 200, 240
NAN_ROWS = slice(4, 8)
INF_ROW, ZERO_ROW, ABSENT_ROW = 2, 10, 11
NAMES = [
    *(f"h.{layer}.{part}" for layer in range(4) for part in ("attn.q", "attn.k", "mlp.up", "mlp.down")),
    "ln_f.weight",
    "ln_f.bias",
]  # fmt: skip
SHAPES = [(8, 4)] * (len(NAMES) - 2) + [(8,), ()]

WIDE_STEPS, WIDE_NAN, WIDE_ROW = 6000, 4321, 77
WIDE_NAMES = [f"model.blocks.{i // 4}.part_{i % 4}.weight" for i in range(400)]


def known(steps=STEPS, scale=1.0):
    """Norms ``[steps, 18]`` that differ in every cell, over three decades."""
    step, row = np.arange(steps)[:, None], np.arange(len(NAMES))[None, :]
    norms = scale * 10 ** (-row / 9 + np.sin(step / 40 + row) / 2).astype("f4")
    norms[NAN_STEP - 1, NAN_ROWS] = np.nan
    norms[INF_STEP - 1, INF_ROW] = np.inf
    norms[:, ZERO_ROW] = 0
    norms[:, ABSENT_ROW] = -1
    return norms.astype("f4")


def wide():
    """Norms ``[6000, 400]`` with a single NaN."""
    step, row = np.arange(WIDE_STEPS)[:, None], np.arange(len(WIDE_NAMES))[None, :]
    norms = (10 ** (-row / 200 + np.sin(step / 700) / 2)).astype("f4")
    norms[WIDE_NAN - 1, WIDE_ROW] = np.nan
    return norms


EVENTS = [
    event(1, "no_gradient", parameter=NAMES[ABSENT_ROW], message="it had no gradient"),
    event(NAN_STEP, "nan", parameter=NAMES[4], message="3 of 32 elements are NaN"),
    event(NAN_STEP, "skipped", message="the step was not applied"),
    event(INF_STEP, "inf", parameter=NAMES[INF_ROW], message="1 of 32 elements is Inf"),
    event(SPIKE, "exploding", message="the total norm is large"),
]


LOSSES = [("loss", "newest")]


def losses(steps):
    """A further column ``[steps, 1]``: not known at every tenth step."""
    step = np.arange(1, steps + 1)[:, None]
    return np.where(step % 10 == 0, np.nan, 2.0 + step / 1000)


def write(
    folder, norms, names, shapes=(), events=(), session="018000000001", chunk=64, further=None
):
    """Writes a run of windows of one step."""
    with LogFile(folder) as log:
        columns = () if further is None else LOSSES
        log.add_layout(session, "AdamW", names, shapes=shapes, columns=columns)
        append(log, norms, session=session, chunk=chunk, further=further)
        if events:
            log.add_events(session, list(events))


def append(log, norms, first=1, session="018000000001", chunk=64, further=None):
    """Writes steps, the first of them with this number."""
    for number, start in enumerate(range(0, len(norms), chunk)):
        rows = norms[start : start + chunk]
        steps = np.arange(first + start, first + start + len(rows))
        more = None if further is None else further[start : start + chunk]
        log.add_windows(session, rows, (steps, steps), segment=number // 100, further=more)


def two(folder, session="018000000001"):
    """Writes a run of two optimizers."""
    with LogFile(folder) as log:
        for stream, (optimizer, name) in enumerate(
            [("Adam", "generator.weight"), ("SGD", "critic.weight")]
        ):
            log.add_layout(session, optimizer, [name], stream=stream)
            steps = np.arange(1, 41)
            norms = np.full((40, 1), stream + 1, "f4")
            log.add_windows(session, norms, (steps, steps), stream=stream)
        log.add_events(
            session, [event(7, "exploding", optimizer="Adam"), event(9, "spike", optimizer="SGD")]
        )


def scalar(folder):
    """Writes a run without gradients: it makes TensorBoard show another tab."""
    value = event_pb2.Event(step=1)
    value.summary.value.add(tag="loss", simple_value=1.0)
    writer = EventFileWriter(str(folder))
    writer.add_event(value)
    writer.close()


def write_all(logdir):
    """Writes every run of the tests; `known/a` is the newest."""
    hostile = np.full((50, len(HOSTILE)), 0.5, "f4")
    message = event(7, "nan", parameter=HOSTILE[0], message=HOSTILE_MESSAGE)
    write(logdir / HOSTILE_RUN, hostile, HOSTILE, events=[message])
    scalar(logdir / "scalar")
    two(logdir / "two")
    write(logdir / "wide", wide(), WIDE_NAMES)
    write(logdir / "known" / "b", known(200, 3.0), NAMES, SHAPES)
    write(logdir / "known" / "a", known(), NAMES, SHAPES, EVENTS, further=losses(STEPS))

"""Bytes: what a step takes, and what a run of a million steps does."""

import math
import struct

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from gradwatch_tensorboard import TensorBoardWriter
from gradwatch_tensorboard.matrix import MatrixWriter

from . import logs

PARAMETERS = 300


def size_of_ours(folder):
    """Bytes of the records in which the Gradients tab's values stand, of all files."""
    total = 0
    for file in folder.glob("*tfevents*"):
        content, place = file.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack_from("<Q", content, place)
            record = content[place : place + length + 16]
            place += len(record)
            if any(f"gradwatch/{kind}/".encode() in record for kind in ("layout", "norms")):
                total += len(record)
    return total


def batches(steps, size, pool, change=lambda norms, part: None):
    """Steps whose norms come from a pool of rows."""
    layout = logs.layout_of(pool.shape[1])
    for start in range(steps.start, steps.stop, size):
        part = range(start, min(start + size, steps.stop))
        norms = pool[: len(part)].copy()
        change(norms, part)
        yield logs.batch(part, norms, layout=layout)


def test_a_step_takes_four_and_a_half_bytes_per_parameter(tmp_path):
    """Before the first doubling, in the batches that the watcher makes; 16 were allowed."""
    pool = np.random.default_rng(0).random((64, PARAMETERS), np.float32)
    write_run(tmp_path, batches(range(1, 2049), 64, pool))
    (file,) = tmp_path.iterdir()
    per_number = file.stat().st_size / (2048 * PARAMETERS)
    assert size_of_ours(tmp_path) <= file.stat().st_size
    assert 4 < per_number < 4.5


def test_a_nan_in_every_step_stays_below_sixteen_bytes(tmp_path):
    """Each step its own chunk, with a table of bad counts: the most that a step can take."""
    pool = np.full((1, PARAMETERS), math.nan, np.float32)
    write_run(tmp_path, batches(range(1, 301), 1, pool))
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size / (300 * PARAMETERS) < 16


def write_run(folder, parts):
    """Writes a whole run, of which one batch at a time is in memory."""
    writer = TensorBoardWriter(folder, step_scalars=False, block_every=10**6, layout=False)
    for part in parts:
        writer.write(part)
    writer.close()


def write_matrix(folder, parts):
    """Writes nothing but the matrix of a run."""
    matrix = MatrixWriter(str(folder))
    with SummaryWriter(folder, max_queue=1000) as summary_writer:
        for part in parts:
            for event, step, time in matrix.add(part, [record.time_s for record in part.steps]):
                summary_writer.file_writer.add_event(event, step, time)
        for event, step, time in matrix.rest():
            summary_writer.file_writer.add_event(event, step, time)


@pytest.mark.slow
@pytest.mark.parametrize("often_bad", [False, True])
def test_a_million_steps_of_300_parameters(tmp_path, often_bad):
    """Under 30 MB, with the spike and every NaN, though every other step be one."""
    rng = np.random.default_rng(0)
    pool = rng.random((5000, PARAMETERS), np.float32)
    lone = rng.choice(np.arange(1, 1_000_001), 20, replace=False)
    spike = 777_778

    def change(norms, part):
        if often_bad:
            norms[::2] = math.nan
        norms[lone[(lone >= part.start) & (lone < part.stop)] - part.start, 7] = math.nan
        if spike in part:
            norms[spike - part.start, 11] = 1e6

    folder = tmp_path / "run"
    write = write_matrix if often_bad else write_run  # bad steps have scalars too, 400 MB of them
    write(folder, batches(range(1, 1_000_001), 5000, pool, change))
    assert size_of_ours(folder) < 30e6
    (stream,) = logs.streams(logs.tensors(folder))
    assert stream.column("first_step").tolist() == [1, *(stream.column("last_step")[:-1] + 1)]
    assert stream.column("last_step")[-1] == 1_000_000
    (window,) = np.flatnonzero(stream.norms[:, 11] == 1e6)
    assert stream.column("first_step")[window] <= spike <= stream.column("last_step")[window]
    if often_bad:
        assert stream.bad[:, 0].sum() == stream.bad[:, 11].sum() == 500_000
        assert len(stream.norms) == 11_170 + 1000
    else:
        assert stream.bad.sum(axis=0).nonzero()[0].tolist() == [7]
        assert stream.column("last_step")[stream.bad[:, 7] > 0].tolist() == sorted(lone)

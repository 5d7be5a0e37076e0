"""From a training's steps to the picture: the real writer, the real TensorBoard."""

import math

import numpy as np
import pytest

from gradwatch.record.records import Event, Layout, RecordBatch, StepRecord
from gradwatch_tensorboard import TensorBoardWriter
from tests.support.board import LOADERS, Board

NAMES = ("embed.weight", "head.weight", "head.bias")
LAYOUT = Layout(NAMES, ("embed", "head", "head"), ((10, 4), (4, 2), (2,)))
NAN_STEP, RESUMED_AT, STEPS = 37, 61, 100


def record(step, row):
    """The record of a step with these norms."""
    norm = float(np.sqrt(np.square(np.maximum(row, 0)).sum()))
    bad = not math.isfinite(norm)
    coef = math.nan if bad else min(1.0, 1.0 / norm)
    return StepRecord(
        step=step, optimizer="AdamW", time_s=step * 0.1, grad_norm=norm, grad_norm_clipped=coef * norm,
        clip_coef=coef, clip_threshold=1.0, clipped=coef < 1, global_step=step,
        outcome="skipped_nonfinite" if bad else "applied", nonfinite_parameters=int(bad),
    )  # fmt: skip


def train(folder, first, last, seed):
    """Writes steps as a training does, in batches of ten; returns their norms."""
    norms = np.random.default_rng(seed).uniform(0.2, 1, (last - first + 1, 3)).astype("f4")
    norms[:, 2] = -1
    writer = TensorBoardWriter(folder)
    for start in range(first, last + 1, 10):
        steps = range(start, min(start + 10, last + 1))
        rows = norms[start - first : start - first + len(steps)]
        events = []
        if NAN_STEP in steps and seed == 0:
            rows[NAN_STEP - start, 1] = np.nan
            events = [Event(NAN_STEP, 1, "nan", NAMES[1], "head", 3.0, 0, "NaN", nan_count=3,
                            optimizer="AdamW", global_step=NAN_STEP)]  # fmt: skip
        records = [record(step, row) for step, row in zip(steps, rows, strict=True)]
        writer.write(RecordBatch(LAYOUT, records, rows, rows, events=events))
    writer.close()
    return norms


@pytest.mark.parametrize("load_fast", LOADERS)
def test_a_resumed_run(load_fast, tmp_path):
    """Every norm, NaN and missing gradient of a run that was resumed in the middle is there."""
    old = train(tmp_path / "run", 1, 80, seed=0)
    new = train(tmp_path / "run", RESUMED_AT, STEPS, seed=1)
    expected = np.concatenate([old[: RESUMED_AT - 1], new])
    with Board(tmp_path, load_fast) as board:
        query = {"run": "run", "optimizer": "AdamW"}
        board.wait(lambda: board.get_json("layout", **query)["last_step"] == STEPS)
        layout = board.get_json("layout", **query)
        assert (layout["parameters"], layout["modules"]) == (list(NAMES), list(LAYOUT.modules))
        assert layout["shapes"] == [[10, 4], [4, 2], [2]]
        found = board.heatmap(**query)
        np.testing.assert_array_equal(found["norms"], expected.T)
        assert np.argwhere(found["bad"]).tolist() == [[1, NAN_STEP - 1]]
        assert found["skipped_steps"].sum() == 1
        assert found["clipped_steps"].sum() == sum(record(1, row).clipped for row in expected)
        (event,) = board.get_json("events", run="run")["events"]
        assert (event["step"], event["parameter"], event["nan_count"]) == (NAN_STEP, NAMES[1], 3)

"""What is read from a folder equals what was live: columns, dtypes, order, every bit."""

import dataclasses
import tempfile

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import gradwatch
from gradwatch.history import load
from gradwatch.record.columns import safe_text
from gradwatch.record.folder.writer import RunFolder
from gradwatch.record.records import (
    EVENT_KINDS,
    NO_GRADIENT,
    Event,
    RecordBatch,
    StepRecord,
    clipped_by,
)

from . import runs

HOSTILE = [
    "a/b", "..", "", "step", "row", "optimizer", "grad_norm", "A", "a", "x" * 10_000, "ä.ß.名前.🎲",
    "\x00", "a\nb", '"quoted"', "layer.0.weight", "\ud800", " ", "%s{0}", "session=1",
]  # fmt: skip
NUMBERS = st.floats(allow_nan=True, allow_infinity=True)
STEPS = st.builds(
    StepRecord,
    step=st.just(0),
    optimizer=st.sampled_from(["AdamW", "AdamW-1", "none", "größe/🎲"]),
    time_s=NUMBERS,
    micro_batches=st.integers(0, 2**40),
    weight=NUMBERS,
    grad_norm=NUMBERS,
    grad_norm_clipped=NUMBERS,
    grad_norm_local=NUMBERS,
    clip_coef=st.one_of(st.just(1.0), st.floats(0, 1), NUMBERS),
    clip_threshold=NUMBERS,
    clipped=st.booleans(),
    outcome=st.sampled_from(["applied", "skipped_nonfinite", "skipped_scaler", "skipped_policy"]),
    nonfinite_parameters=st.integers(0, 2**31),
    loss=NUMBERS,
    lr=NUMBERS,
    loss_scale=NUMBERS,
    noise_scale=NUMBERS,
    noise_scale_stderr=NUMBERS,
    hessian_eigenvalue=NUMBERS,
    hessian_trace=NUMBERS,
    global_step=st.integers(-(2**62), 2**62),
)
EVENTS = st.builds(
    Event,
    step=st.integers(0, 2**40),
    micro_batch=st.integers(0, 9),
    kind=st.sampled_from(list(EVENT_KINDS)),
    parameter=st.one_of(st.sampled_from(HOSTILE), st.text(max_size=9)),
    module=st.text(max_size=9),
    value=st.one_of(NUMBERS, st.integers(-9, 9)),
    rank=st.integers(0, 9),
    message=st.text(max_size=30),
    nan_count=st.integers(0, 2**40),
    inf_count=st.integers(0, 2**40),
    optimizer=st.sampled_from(["AdamW", "none"]),
    global_step=st.integers(0, 2**40),
)
NORMS32 = st.one_of(
    st.sampled_from([NO_GRADIENT, float("nan"), float("inf")]), st.floats(0, 2**127, width=32)
)


@st.composite
def batches(draw):
    """Some deliveries of one run: missing gradients, measured clips, statistics now and then."""
    names = draw(st.lists(st.sampled_from(HOSTILE), unique=True, max_size=6))
    layout = runs.layout(*names)
    statistics = draw(st.lists(st.sampled_from(["max", "std"]), unique=True))
    made, step = [], 1
    for _ in range(draw(st.integers(1, 4))):
        records = draw(st.lists(STEPS, min_size=1, max_size=5))
        for record in records:
            record.step = step
            step += draw(st.integers(0, 2))
        shape = (len(records), len(names))
        norms = draw(hnp.arrays(np.float32, shape, elements=NORMS32))
        clipped = clipped_by(norms, np.array([record.clip_coef for record in records])[:, None])
        if draw(st.booleans()):
            clipped = draw(hnp.arrays(np.float32, shape, elements=NORMS32))
        numbers = {
            name: draw(hnp.arrays(np.float64, shape, elements=NUMBERS)) for name in statistics
        }
        events = tuple(draw(st.lists(EVENTS, max_size=3)))
        made.append(RecordBatch(layout, records, norms, clipped, numbers, events))
    return made


@settings(deadline=None, max_examples=25)
@given(batches(), st.booleans())
@example([runs.batch([1, 2], runs.layout(*HOSTILE))], True)
@example([runs.batch([1], runs.layout())], True)
def test_frames_are_equal(deliveries, closed):
    """A loaded history gives the frames of the live one, before and after the parts are merged."""
    with tempfile.TemporaryDirectory() as folder:
        runs.write(folder, *deliveries, close=closed)
        loaded, live = load(folder), runs.live(*deliveries)
        runs.assert_same(loaded, live)
        assert loaded.layout == live.layout
        assert loaded.advice() == live.advice()
        assert repr(loaded) == repr(live)
        np.testing.assert_equal(loaded.clip_rate(), live.clip_rate())


@settings(deadline=None, max_examples=15)
@given(batches(), st.data())
def test_a_selection_is_a_part_of_the_whole(deliveries, data):
    """Columns, names and a range of steps give the rows of the full frame, live and loaded."""
    bounds = st.one_of(st.none(), st.integers(-2, 30))
    start, stop = data.draw(bounds), data.draw(bounds)
    live = runs.live(*deliveries)
    names = data.draw(st.lists(st.sampled_from(live.names), unique=True)) if live.names else []
    with tempfile.TemporaryDirectory() as folder:
        runs.write(folder, *deliveries)
        for history in (live, load(folder)):
            every = history.parameters()
            inside = every["step"].between(
                -99 if start is None else start, (10**9 if stop is None else stop) - 1
            )
            expected = every[
                inside & every["parameter"].isin(list(map(safe_text, names)))
            ].reset_index(drop=True)
            chosen = history.parameters(
                names, columns=["grad_norm_clipped"], start=start, stop=stop
            )
            assert list(chosen) == ["step", "parameter", "grad_norm_clipped"]
            pd.testing.assert_frame_equal(chosen, expected[list(chosen)], check_exact=True)
            steps = history.steps(["lr", "outcome"], start=start, stop=stop)
            assert list(steps) == ["lr", "outcome"]
            whole = history.steps()
            low, high = (-99 if start is None else start), (10**9 if stop is None else stop)
            assert steps.index.tolist() == [step for step in whole.index if low <= step < high]


def test_a_norm_that_no_float32_holds_makes_the_column_float64(tmp_path):
    """Once a wide norm came, all are float64 and the clipped ones are taken anew, as live."""
    narrow, wide = runs.batch([1, 2], clip_coef=0.3), runs.batch([3])
    narrow = dataclasses.replace(
        narrow, clipped_norms=clipped_by(narrow.norms, np.full((2, 1), 0.3))
    )
    norms = wide.norms.astype(np.float64) * 1e300
    wide = dataclasses.replace(wide, norms=norms, clipped_norms=norms)
    runs.write(tmp_path, narrow, wide, close=False)
    first = load(tmp_path).parameters()
    assert first["grad_norm"].dtype == np.float64
    assert first["grad_norm"].max() == 2003e300


@pytest.mark.parametrize("steps", [0, 1, 200])
def test_a_watched_training_is_read_back(tmp_path, steps):
    """What watch() recorded of two optimizers, with statistics and a NaN, is in the folder."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    optimizers = [
        torch.optim.AdamW(model[0].parameters()),
        torch.optim.SGD(model[2].parameters(), lr=0.01),
    ]
    with gradwatch.watch(
        model,
        optimizers,
        clip=0.2,
        sinks=[RunFolder(tmp_path)],
        statistics=("norm", "max", "update_ratio"),
        every=7,
    ) as watcher:
        for step in range(steps):
            loss = model(torch.randn(5, 4)).square().mean()
            (loss * float("nan") if step == 100 else loss).backward()
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()
    if steps:
        runs.assert_same(load(tmp_path), watcher.history)
        assert load(tmp_path).advice() == watcher.history.advice()
    else:
        assert list(tmp_path.iterdir()) == []


def test_a_small_buffer_is_the_end_of_the_folder(tmp_path):
    """Of a run longer than the buffer, the live frame is the end of the loaded one."""
    x = torch.tensor(2.0, requires_grad=True)
    with gradwatch.watch({"x": x}, buffer_size=8, sinks=[RunFolder(tmp_path)]) as watcher:
        for _ in range(100):
            x.grad = None
            (x * 3).backward()
    loaded = load(tmp_path).steps()
    assert loaded.index.tolist() == list(range(1, 101))
    assert loaded.tail(8).equals(watcher.history.steps())

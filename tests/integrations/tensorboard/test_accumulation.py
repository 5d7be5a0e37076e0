"""What TensorBoard shows of accumulation: the batch beside the noise scale, and why it changed."""

import math

import pytest
import torch

import gradwatch
from gradwatch_tensorboard import TensorBoardWriter

BATCH_TAGS = {"gradwatch/noise_scale", "gradwatch/weight", "gradwatch/micro_batches"}
CHART = "batch and noise scale"


def write(folder, *batches, **options):
    """Writes a whole run."""
    writer = TensorBoardWriter(folder, **options)
    for batch in batches:
        writer.write(batch)
    writer.close()


def has_chart(reader):
    """Whether the Custom Scalars dashboard has the chart of batch and noise scale."""
    values = [value for event in reader.raw_events() for value in event.summary.value]
    (config,) = [value for value in values if value.tag == "custom_scalars__config__"]
    return CHART.encode() in config.SerializeToString()


def noisy(run, step, value, stderr, **fields):
    """A step of two micro-batches with a noise scale."""
    fields = {"micro_batches": 2, "weight": 8.0, **fields}
    return run.record(step, noise_scale=value, noise_scale_stderr=stderr, **fields)


def test_no_chart_where_nothing_is_accumulated(run, read, tmp_path):
    """Steps of one backward have no batch, no noise scale, and no empty chart for them."""
    write(tmp_path, run.batch(range(1, 31)))
    assert not BATCH_TAGS & set(read(tmp_path).tags())
    assert not has_chart(read(tmp_path))


def test_batch_and_noise_scale_share_a_chart(run, read, tmp_path):
    """Where the first steps accumulate, one custom chart compares the two."""
    write(tmp_path, run.batch([noisy(run, step, 40.0, 4.0) for step in range(1, 31)]))
    assert set(read(tmp_path).tags()) >= BATCH_TAGS
    assert has_chart(read(tmp_path))


def test_batch_is_written_from_the_first_accumulation_on(run, read, tmp_path):
    """A schedule that begins with one micro-batch, and returns to it, shows both changes."""
    counts = [1, 1, 4, 4, 1]
    records = [run.record(i, micro_batches=c, weight=8.0 * c) for i, c in enumerate(counts, 1)]
    write(tmp_path, run.batch(records))
    assert read(tmp_path).series("gradwatch/micro_batches") == [(3, 4), (4, 4), (5, 1)]
    assert read(tmp_path).series("gradwatch/weight") == [(3, 32), (4, 32), (5, 8)]


def test_batch_stands_beside_the_noise_scale_of_ranks(run, read, tmp_path):
    """Several ranks have a noise scale with one micro-batch each, and the batch is shown with it."""
    write(tmp_path, run.batch([noisy(run, 1, 40.0, 4.0, micro_batches=1, weight=16.0)]))
    assert read(tmp_path).series("gradwatch/noise_scale") == [(1, 40.0)]
    assert read(tmp_path).series("gradwatch/weight") == [(1, 16.0)]


@pytest.mark.parametrize(
    ("value", "stderr"),
    [(math.nan, math.nan), (1e6, 2e6), (math.inf, math.inf), (5.0, math.nan), (0.0, 0.0)],
    ids=["unknown", "less than its error", "infinite", "no error known", "no noise"],
)
def test_noise_scale_that_says_nothing_is_left_out(run, read, tmp_path, value, stderr):
    """A value that is not above its standard error would set the axis, and is not written."""
    write(tmp_path, run.batch([noisy(run, 1, value, stderr), noisy(run, 2, 40.0, 4.0)]))
    assert read(tmp_path).series("gradwatch/noise_scale") == [(2, 40.0)]


def test_thinning_keeps_the_newest(run, read, tmp_path):
    """With every=10 batch and noise scale are those of the step that they stand at."""
    records = [noisy(run, i, 10.0 + i, 1.0, weight=float(i)) for i in range(1, 21)]
    write(tmp_path, run.batch(records), every=10)
    assert read(tmp_path).series("gradwatch/noise_scale") == [(10, 20.0), (20, 30.0)]
    assert read(tmp_path).series("gradwatch/weight") == [(10, 10.0), (20, 20.0)]


@pytest.mark.parametrize("kind", ["accumulate", "dropped", "out_of_memory"])
def test_events_of_accumulation_become_text(run, read, tmp_path, kind):
    """Events that are of the run, and of no optimizer, are listed without naming one."""
    event = run.event(
        3, kind=kind, parameter="", optimizer="none", message="4 micro-batches instead of 2."
    )
    write(tmp_path, run.batch(range(1, 4), [event]))
    text = f"* step 3, **{kind.replace('_', chr(92) + '_')}**: 4 micro-batches instead of 2."
    assert read(tmp_path).texts() == [(3, text)]


def test_a_real_run_tells_what_changed_and_why(read, tmp_path):
    """A watched run that goes from two to four micro-batches leaves the batch and the event."""
    x = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.01)
    sinks = [TensorBoardWriter(tmp_path)]
    with gradwatch.watch({"x": x}, optimizer, accumulate={0: 2, 3: 4}, sinks=sinks) as watcher:
        for number in range(14):
            watcher.backward((x * (1 + number % 2)).sum(), weight=8)
            watcher.step()
    reader = read(tmp_path)
    assert reader.values("gradwatch/weight") == [16, 16, 16, 32, 32]
    assert reader.values("gradwatch/micro_batches") == [2, 2, 2, 4, 4]
    assert len(reader.values("gradwatch/noise_scale")) == 4
    assert "4 micro-batches instead of 2" in reader.texts()[-1][1]

"""The matrix in real event files, read back by both of TensorBoard's loaders."""

import itertools
import json
import math

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from gradwatch.adapters import STEP_COLUMNS
from gradwatch_dashboard.wire import COLUMNS, Tag
from gradwatch_tensorboard import TensorBoardWriter

from . import logs


def batches(steps, parameters=4, size=64, **fields):
    """A run in batches, its norms from :func:`logs.rows`."""
    for start in range(steps.start, steps.stop, size):
        part = range(start, min(start + size, steps.stop))
        yield logs.batch(part, logs.rows(part, parameters), **fields)


def test_a_short_run_reads_as_it_was_written(load, tmp_path):
    """Norms, bad counts, the columns of the steps and the layout are those of the records."""
    folder = tmp_path / "run"
    norms = np.array([[1, 0, -1], [2, math.nan, -1], [math.inf, 5, 3]], np.float32)
    logs.write(folder, logs.batch([1, 2, 3], norms, offset=10))
    (stream,) = logs.streams(load(folder))
    np.testing.assert_array_equal(stream.norms, norms)
    np.testing.assert_array_equal(stream.bad, [[0, 0, 0], [0, 1, 0], [1, 0, 0]])
    further = [name for name, _ in stream.layout.columns]
    assert further == [name for name, one in STEP_COLUMNS.items() if one.tab]
    table = dict(zip((*COLUMNS, *further), stream.table.T.tolist(), strict=True))
    assert table["first_step"] == table["last_step"] == [1, 2, 3]
    assert table["global_step"] == [11, 12, 13]
    assert np.diff(table["wall_time"]) == pytest.approx([0.01, 0.01], abs=1e-3)
    np.testing.assert_array_equal(table["grad_norm"], [1, math.nan, math.nan])
    np.testing.assert_array_equal(table["grad_norm_clipped"], [0.5, math.nan, math.nan])
    assert table["clip_threshold"] == [1, 1, 1]
    assert table["clip_coef"] == [0.5, 0.5, 0.5]
    assert table["bad_steps"] == [0, 1, 1]
    assert table["clipped_steps"] == [1, 1, 1]
    assert table["skipped_steps"] == [0, 0, 0]
    assert stream.layout.optimizer == "AdamW"
    assert stream.layout.parameters == ("layers.0.weight", "layers.0.bias", "layers.1.weight")
    assert stream.layout.modules == ("layers.0", "layers.0", "layers.1")
    assert stream.layout.shapes == ((1, 2), (2, 2), (3, 2))


def test_four_hundred_chunks_are_all_there(load, tmp_path):
    """400 chunks in 4 segments of 100: no row is missing, none is there twice, none has moved."""
    folder = tmp_path / "run"
    # After step 2048 a chunk covers 128 steps, then 256, ...: a batch fills one.
    steps = range(1, 64 * (32 + 16 * sum(2**i for i in range(1, 5))) + 1)
    logs.write(folder, *batches(steps, size=512))
    (short,) = logs.streams(load(folder))
    assert short.steps() == list(steps)
    assert (short.norms[:, 0] == short.column("last_step")).all()
    many = tmp_path / "many"
    logs.write(many, *(part for i in range(400) for part in batches(range(2 * i + 1, 2 * i + 3))
                       for part in [nan_in(part)]))  # fmt: skip
    tensors = load(many)
    (stream,) = logs.streams(tensors)
    assert stream.chunks == [2] * 400
    assert stream.steps() == list(range(1, 801))
    assert sorted(tag.segment for tag in tensors if tag.kind == "norms") == [0, 1, 2, 3]


def nan_in(batch):
    """The batch with a NaN in its last step, at which a chunk goes out."""
    batch.norms[-1, -1] = math.nan
    return batch


def test_one_event_for_each_chunk(tmp_path):
    """Norms, bad counts and steps of a chunk stand in one Event: a reader sees all or none."""
    logs.write(tmp_path, *batches(range(1, 200)))
    kinds = [[Tag.parse(value.tag).kind for value in values]
             for event in logs.raw_events(tmp_path) if (values := logs.our_values(event))]  # fmt: skip
    assert kinds == [["layout"], *[["norms", "bad", "steps"]] * 4]


def test_metadata_is_written_once(tmp_path):
    """A tag is described by its first Event only."""
    logs.write(tmp_path, *batches(range(1, 200)))
    values = [value for event in logs.raw_events(tmp_path) for value in logs.our_values(event)]
    described = [value.tag for value in values if value.metadata.plugin_data.plugin_name]
    assert sorted(described) == sorted({value.tag for value in values})


def test_bad_counts_take_no_room_where_there_are_none(tmp_path):
    """A chunk without a NaN has a table of bad counts of no rows."""
    logs.write(tmp_path, *batches(range(1, 200)))
    contents = [value.tensor.tensor_content for event in logs.raw_events(tmp_path)
                for value in logs.our_values(event) if "/bad/" in value.tag]  # fmt: skip
    assert contents == [b""] * 4


def test_steps_of_every_tag_rise(tmp_path):
    """The data server drops a point that is not above the one before."""
    logs.write(
        tmp_path,
        *(logs.batch([step], [[math.nan]], events=[logs.event(step, global_step=7)] * 2, global_step=7)
          for step in range(1, 30)),
    )  # fmt: skip
    steps = {}
    for event in logs.raw_events(tmp_path):
        for value in logs.our_values(event):
            steps.setdefault(value.tag, []).append(event.step)
    assert all(a < b for series in steps.values() for a, b in itertools.pairwise(series))
    assert len(steps) == 5


def test_a_nan_is_on_the_disk_when_write_returns(load, tmp_path):
    """With the step that it is in, and with the event that tells of it."""
    folder = tmp_path / "run"
    summary_writer = SummaryWriter(folder, flush_secs=3600)
    writer = TensorBoardWriter(summary_writer)
    norms = logs.rows(range(5000, 5004), 4)
    norms[-1, 2] = math.nan
    writer.write(logs.batch(range(5000, 5004), norms, events=[logs.event(5003)]))
    tensors = load(folder)
    (stream,) = logs.streams(tensors)
    assert stream.steps() == [5000, 5001, 5002, 5003]
    assert stream.bad.sum(axis=0).tolist() == [0, 0, 1, 0]
    assert [entry["step"] for entry in logs.events(tensors)] == [5003]
    summary_writer.close()


def test_single_nan_steps_are_never_lost(load, tmp_path):
    """20 single NaN steps in 100,000: each in a window of its own count, and in an event."""
    folder = tmp_path / "run"
    rng = np.random.default_rng(0)
    bad = sorted(rng.choice(np.arange(1, 100_001), 20, replace=False).tolist())
    writer = TensorBoardWriter(folder, every=100)
    for start in range(1, 100_001, 1000):
        steps = range(start, start + 1000)
        norms = np.ones((1000, 5), np.float32)
        inside = [step for step in bad if step in steps]
        norms[[step - start for step in inside], 3] = math.nan
        events = [logs.event(step) for step in inside]
        writer.write(logs.batch(steps, norms, events=events))
    writer.close()
    tensors = load(folder)
    (stream,) = logs.streams(tensors)
    assert stream.steps() == list(range(1, 100_001))
    assert stream.bad.sum(axis=0).tolist() == [0, 0, 0, 20, 0]
    spans = stream.table[stream.column("bad_steps") > 0][:, :2].tolist()
    assert [last for _, last in spans] == bad  # each ends its window
    assert [entry["step"] for entry in logs.events(tensors)] == bad
    assert np.nanmax(stream.norms) == 1


def test_a_resumed_run_in_its_own_folder(load, tmp_path, age):
    """Of the session that is replaced all steps before the resume are there, in a chunk cut too."""
    folder = tmp_path / "run"
    logs.write(folder, *batches(range(1, 151)), *[logs.batch([151], [[math.nan] * 4])])
    age(folder)
    logs.write(folder, *batches(range(101, 201)))
    old, new = logs.streams(load(folder))
    assert old.session < new.session
    assert old.steps()[:100] == list(range(1, 101))
    assert (old.norms[:100, 0] == np.arange(1, 101)).all()
    assert new.steps() == list(range(101, 201))


def test_events_before_a_resume_stay(load, tmp_path, age):
    """A batch with events before and after the step at which the run is resumed loses none of them."""
    folder = tmp_path / "run"
    (part,) = batches(range(1, 50))
    events = [logs.event(step) for step in (5, 20, 40)]
    logs.write(folder, logs.batch(range(1, 50), part.norms, events=events))
    age(folder)
    logs.write(folder, *batches(range(31, 60)))
    assert [entry["step"] for entry in logs.events(load(folder))][:2] == [5, 20]


def test_a_resumed_run_in_a_shared_writer(load, tmp_path, age):
    """Two SummaryWriters, one after the other in a folder: nothing is purged, both are read."""
    folder = tmp_path / "run"
    for steps in (range(1, 151), range(101, 201)):
        with SummaryWriter(folder) as summary_writer:
            logs.write(summary_writer, *batches(steps))
        age(folder)
    old, new = logs.streams(load(folder))
    assert old.steps() == list(range(1, 151))
    assert new.steps() == list(range(101, 201))


def test_two_writers_in_one_file(load, tmp_path):
    """Two fits that share a logger are two sessions, in their order."""
    folder = tmp_path / "run"
    with SummaryWriter(folder) as summary_writer:
        logs.write(summary_writer, *batches(range(1, 70)))
        logs.write(summary_writer, *batches(range(1, 30)))
    old, new = logs.streams(load(folder))
    assert old.session < new.session
    assert (len(old.steps()), len(new.steps())) == (69, 29)


def test_hostile_names_come_back_as_they_are(load, tmp_path):
    """Slashes, quotes, line ends and markup in names, half a surrogate pair in a message: all as it was."""
    folder = tmp_path / "run"
    names = ("a/b", '"', "\n", "<img src=x onerror=alert(1)>", "ä\x00")
    layout = logs.layout_of(len(names))
    layout = type(layout)(names, names)
    part = logs.batch(
        [1], logs.rows([1], len(names)), "Adam/<b>", layout, [logs.event(1, message="\ud800")]
    )
    logs.write(folder, part)
    tensors = load(folder)
    (stream,) = logs.streams(tensors)
    assert stream.layout.parameters == stream.layout.modules == names
    assert stream.layout.optimizer == "Adam/<b>"
    assert stream.layout.shapes == ()
    assert logs.events(tensors)[0]["message"] == "\ud800"


def test_the_tags_name_the_version(tmp_path):
    """Every tag is a tensor of the plugin and says which version of the format it is."""
    logs.write(
        tmp_path, *batches(range(1, 10)), logs.batch([10], [[1.0] * 4], events=[logs.event(10)])
    )
    found = {value.tag: value.metadata for event in logs.raw_events(tmp_path)
             for value in logs.our_values(event)}  # fmt: skip
    assert len(found) == 5
    for metadata in found.values():
        assert metadata.plugin_data.plugin_name == "gradwatch"
        assert json.loads(metadata.plugin_data.content) == {"version": 2}


def test_off(tmp_path):
    """Without the heat map nothing is written that only the Gradients tab reads."""
    logs.write(tmp_path, *batches(range(1, 100)), logs.batch([100], [[math.nan] * 4], events=[logs.event(100)]),
               heatmap=False, step_scalars=True)  # fmt: skip
    assert not [value for event in logs.raw_events(tmp_path) for value in logs.our_values(event)]


@pytest.mark.parametrize("value", [0, None, "yes"])
def test_refuses_what_is_no_flag(tmp_path, value):
    """The message shows name and value."""
    with pytest.raises(TypeError, match=f"heatmap must be True or False, got {value!r}"):
        TensorBoardWriter(tmp_path, heatmap=value)

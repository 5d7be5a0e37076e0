"""TensorBoardWriter: what is in the event file, read back with TensorBoard's own reader."""

import itertools
import math

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

import gradwatch
from gradwatch.adapters import SCALARS
from gradwatch.record.records import Sink
from gradwatch_tensorboard import TensorBoardWriter
from gradwatch_tensorboard.scalars import DERIVED_SCALARS
from tests.support import zoo
from tests.support.explanations import explanation


def write(folder, *batches, **options):
    """Writes a whole run."""
    writer = TensorBoardWriter(folder, **options)
    for batch in batches:
        writer.write(batch)
    writer.close()
    return writer


def rises(steps):
    """Whether each step is above the one before."""
    return all(a < b for a, b in itertools.pairwise(steps))


def test_is_a_sink(tmp_path):
    """The watcher takes it as a sink."""
    assert isinstance(TensorBoardWriter(tmp_path), Sink)


def test_scalars_of_a_step(run, read, tmp_path):
    """Each scalar holds the record's number at the record's global step."""
    record = run.record(
        1, grad_norm=4.0, clip_coef=0.25, loss=2.5, lr=0.1, loss_scale=8.0, global_step=7,
        micro_batches=4, weight=32.0, noise_scale=50.0, noise_scale_stderr=5.0,
        hessian_eigenvalue=20.0, hessian_trace=90.0, grad_norm_all=5.0, discarded=2,
    )  # fmt: skip
    write(tmp_path, run.batch([record], norms=[[1.0, 3.0, 2.0]]))
    found = {tag: read(tmp_path).series(tag) for tag in read(tmp_path).tags()}
    expected = {
        "grad_norm": 4.0, "grad_norm_clipped": 1.0, "clip_coef": 0.25, "clip_rate": 0.0, "norm_p05": 1.1,
        "norm_p50": 2.0, "norm_p95": 2.9, "norm_max": 3.0, "nonfinite_steps_total": 0.0,
        "skipped_steps_total": 0.0, "loss": 2.5, "lr": 0.1, "loss_scale": 8.0,
        "noise_scale": 50.0, "weight": 32.0, "micro_batches": 4.0,
        "hessian_eigenvalue": 20.0, "hessian_trace": 90.0, "grad_norm_all": 5.0, "discarded": 2.0,
    }  # fmt: skip
    columns = {name for name, scalar in SCALARS.items() if scalar.tensorboard}
    assert expected.keys() == columns | DERIVED_SCALARS.keys()
    for name, value in expected.items():
        assert found[f"gradwatch/{name}"] == [(7, pytest.approx(value))]
    assert found["gradwatch_blocks/encoder"] == [(7, pytest.approx(math.sqrt(10)))]
    assert found["gradwatch_blocks/head"] == [(7, 2.0)]
    assert len(found) == len(expected) + 2


def test_a_clip_that_is_not_known_makes_no_point(run, read, tmp_path):
    """Where it cannot be seen whether the loop clipped, nothing is written of it; the norm is."""
    unknown = {"clip_coef": math.nan, "clipped": None}
    write(tmp_path / "none", run.batch([run.record(step, **unknown) for step in (1, 2)]))
    tags = {tag.partition("/")[2] for tag in read(tmp_path / "none").tags()}
    assert "grad_norm" in tags
    assert not {"clip_coef", "clip_rate", "grad_norm_clipped"} & tags
    records = [run.record(1, clipped=True), run.record(2, **unknown), run.record(3, clipped=False)]
    write(tmp_path / "some", run.batch(records))
    series = read(tmp_path / "some").series
    assert [step for step, _ in series("gradwatch/clip_coef")] == [1, 3]
    assert series("gradwatch/clip_rate") == [(1, 1.0), (2, 1.0), (3, 0.5)]


def test_unknown_loss_and_rate_are_left_out(run, read, tmp_path):
    """A loss that gradwatch did not see and a loss scale that is always 1 make no chart."""
    write(tmp_path, run.batch(range(1, 4)))
    assert not {"gradwatch/loss", "gradwatch/lr", "gradwatch/loss_scale"} & set(
        read(tmp_path).tags()
    )


def test_loss_scale_stays_once_it_was_seen(run, read, tmp_path):
    """A scaler that comes down to 1 is shown to do so."""
    records = [run.record(i, loss_scale=scale) for i, scale in enumerate([1.0, 2.0, 1.0], 1)]
    write(tmp_path, run.batch(records))
    assert read(tmp_path).series("gradwatch/loss_scale") == [(2, 2.0), (3, 1.0)]


def test_counters_count(run, read, tmp_path):
    """The totals say how many steps were non-finite and how many were not applied, so far."""
    bad = run.nan_step(2)
    bad.steps[0].outcome = "skipped_nonfinite"
    write(tmp_path, run.batch(range(1, 2)), bad, run.batch(range(3, 5)))
    assert read(tmp_path).values("gradwatch/nonfinite_steps_total") == [0, 1, 1, 1]
    assert read(tmp_path).values("gradwatch/skipped_steps_total") == [0, 1, 1, 1]


def test_one_event_per_step(run, read, tmp_path):
    """All values of a step go out in one Event, blocks and non-finite steps included."""
    write(tmp_path, run.batch(range(1, 40)), run.nan_step(40), run.batch(range(41, 65)))
    assert read(tmp_path).scalar_events_per_step() == dict.fromkeys(range(1, 65), 1)


def test_tags_do_not_grow_with_the_parameters(make_run, read, tmp_path):
    """A model of 2,000 parameters has at most eight tags more than one of 12 blocks."""
    counts = []
    for parameters in (24, 2000):
        run = make_run([f"layers.{i // 2}" for i in range(parameters)])
        write(tmp_path / str(parameters), run.batch(range(1, 21)))
        tags = read(tmp_path / str(parameters)).tags()
        counts.append(len(tags))
        assert sum(tag.startswith("gradwatch_blocks/") for tag in tags) <= 20
    assert counts[1] <= counts[0] + 8


def test_few_bytes_per_step(run, tmp_path):
    """A step takes under 500 bytes: TensorBoard's writer spends 0.1 us of Python on each."""
    sizes = []
    for steps in (1000, 2000):
        records = [run.record(step, loss=2.5, lr=0.1) for step in range(1, steps + 1)]
        folder = tmp_path / str(steps)
        write(folder, run.batch(records))
        (file,) = folder.iterdir()
        sizes.append(file.stat().st_size)
    assert (sizes[1] - sizes[0]) / 1000 < 500


def test_first_metadata_says_what_a_tag_means(run, read, tmp_path):
    """Each tag carries one sentence, once."""
    write(tmp_path, run.batch(range(1, 21)), run.nan_step(21))
    described = [
        (value.tag, value.metadata.summary_description)
        for event in read(tmp_path).raw_events()
        for value in event.summary.value
        if value.metadata.summary_description
    ]
    assert sorted(tag for tag, _ in described) == sorted(read(tmp_path).tags())
    assert all(text.endswith(".") for _, text in described)


def test_nan_is_written_as_nan(run, read, tmp_path):
    """A NaN norm is a point in the file, and so is the norm of the block that holds it."""
    write(tmp_path, run.batch(range(1, 3)), run.nan_step(3), run.batch(range(4, 6)))
    reader = read(tmp_path)
    assert [math.isnan(v) for v in reader.values("gradwatch/grad_norm")] == [0, 0, 1, 0, 0]
    assert math.isnan(dict(reader.series("gradwatch_blocks/encoder"))[3])
    assert dict(reader.series("gradwatch_blocks/head"))[3] == pytest.approx(0.5)
    assert dict(reader.series("gradwatch/norm_max"))[3] == pytest.approx(0.5)


def test_infinite_and_huge_norms_are_written(run, read, tmp_path):
    """Inf stays Inf; a float64 norm that float32 cannot hold becomes Inf and raises nothing."""
    records = [run.record(1, grad_norm=math.inf), run.record(2, grad_norm=1e300)]
    write(tmp_path, run.batch(records, norms=[[1.0, math.inf, 1.0], [1.0, 2.0, 1.0]]))
    assert read(tmp_path).values("gradwatch/grad_norm") == [math.inf, math.inf]


def test_nonfinite_event_is_written_at_such_steps_only(run, read, tmp_path):
    """The series has as many points as there were non-finite steps: sampling cannot lose them."""
    batches = [
        run.batch(range(1, 50)),
        run.nan_step(50),
        run.batch(range(51, 99)),
        run.nan_step(99),
    ]
    write(tmp_path, *batches)
    assert read(tmp_path).series("gradwatch/nonfinite_event") == [(50, 1.0), (99, 1.0)]


def test_events_become_text(run, read, tmp_path):
    """The Text dashboard names step, kind and parameter."""
    write(tmp_path, run.batch(range(1, 3)), run.nan_step(3))
    assert read(tmp_path).texts() == [(3, r"* step 3, **nan** (encoder.p0): 3 NaN elements")]


def test_layout_is_written_once(run, read, tmp_path):
    """However many batches, the Custom Scalars dashboard gets one layout, or none."""
    tag = "custom_scalars__config__"
    write(tmp_path / "on", *[run.batch(range(i, i + 5)) for i in (1, 6, 11)])
    values = [v.tag for e in read(tmp_path / "on").raw_events() for v in e.summary.value]
    assert values.count(tag) == 1
    write(tmp_path / "off", run.batch(range(1, 5)), layout=False)
    assert tag not in read(tmp_path / "off").tensor_tags()


def test_without_step_scalars(run, read, tmp_path):
    """Where a framework logs the scalars, blocks, non-finite events, text and layout remain."""
    batches = [run.batch(range(1, 11)), run.nan_step(11)]
    write(tmp_path, *batches, step_scalars=False, heatmap=False)
    reader = read(tmp_path)
    blocks = ["gradwatch_blocks/encoder", "gradwatch_blocks/head"]
    assert sorted(reader.tags()) == ["gradwatch/nonfinite_event", *blocks]
    assert sorted(reader.tensor_tags()) == [
        "custom_scalars__config__", "gradwatch/events/text_summary",
    ]  # fmt: skip


def test_blocks_without_a_gradient_are_left_out(run, read, tmp_path):
    """A frozen part of the model makes no chart of zeros."""
    batch = run.batch([run.record(1)], norms=[[run.no_gradient, run.no_gradient, 2.0]])
    write(tmp_path, batch, block_every=1)
    blocks = [tag for tag in read(tmp_path).tags() if "blocks" in tag]
    assert blocks == ["gradwatch_blocks/head"]
    assert read(tmp_path).values("gradwatch/norm_p05") == [2.0]


def test_thinning_keeps_the_spike(run, read, tmp_path):
    """With every=10 there is a tenth of the points, and the spike at step 15 is in one of them."""
    records = [run.record(step, grad_norm=1.0) for step in range(1, 41)]
    records[14].grad_norm, records[14].clip_coef = 100.0, 0.01
    write(tmp_path, run.batch(records), every=10)
    assert read(tmp_path).series("gradwatch/grad_norm") == [(10, 1), (20, 100), (30, 1), (40, 1)]
    assert min(read(tmp_path).values("gradwatch/clip_coef")) == pytest.approx(0.01)


def test_thinning_does_not_depend_on_the_batches(run, read, tmp_path):
    """How the hub cuts the run into batches changes nothing in the file."""
    write(tmp_path / "one", run.batch(range(1, 36)), every=10)
    write(tmp_path / "many", *[run.batch(range(i, i + 5)) for i in range(1, 36, 5)], every=10)
    for tag in read(tmp_path / "one").tags():
        assert read(tmp_path / "one").series(tag) == read(tmp_path / "many").series(tag)


def test_steps_with_events_are_always_written(run, read, tmp_path):
    """Thinned or not, a step at which something happened has a point of its own."""
    exploding = run.batch(range(14, 15), [run.event(14, kind="exploding")])
    batches = [run.batch(range(1, 5)), run.nan_step(5), run.batch(range(6, 14)), exploding]
    write(tmp_path, *batches, every=1000, block_every=1000)
    assert read(tmp_path).steps("gradwatch/grad_norm") == [5, 14]
    assert read(tmp_path).steps("gradwatch_blocks/head") == [5, 14]


def test_close_writes_what_thinning_holds(run, read, tmp_path):
    """The last steps of a run are not lost to the interval that they did not fill."""
    write(tmp_path, run.batch(range(1, 26)), every=10)
    assert read(tmp_path).steps("gradwatch/grad_norm") == [10, 20, 25]
    assert read(tmp_path).scalar_events_per_step() == {10: 1, 20: 1, 25: 1}


def test_steps_only_rise(run, read, tmp_path):
    """A step that comes again is left out of the series; what happened at it is in the text."""
    again = run.batch(range(3, 7), [run.event(3, kind="skipped", message="again")])
    write(tmp_path, run.batch(range(1, 6)), run.nan_step(6), again, run.batch(range(7, 9)))
    reader = read(tmp_path)
    assert reader.steps("gradwatch/grad_norm") == [1, 2, 3, 4, 5, 6, 7, 8]
    assert rises([step for step, _ in reader.texts()])
    assert "again" in reader.texts()[-1][1]


def test_step_zero_is_written(run, read, tmp_path):
    """Lightning counts from zero."""
    write(tmp_path, run.batch([run.record(1, global_step=0), run.record(2, global_step=1)]))
    assert read(tmp_path).steps("gradwatch/grad_norm") == [0, 1]


def test_resumed_run_takes_over(run, read, tmp_path, age):
    """A second writer in the folder continues the series; steps after its first are its own."""
    write(tmp_path, run.batch(range(1, 51)))
    age(tmp_path)
    write(tmp_path, run.batch([run.record(step, grad_norm=99.0) for step in range(31, 61)]))
    reader = read(tmp_path)
    assert len(reader.files) == 2
    for tag in reader.tags():
        assert rises(reader.steps(tag))
    norms = dict(reader.series("gradwatch/grad_norm"))
    assert list(norms) == list(range(1, 61))
    assert norms[30] == pytest.approx(3.0)
    assert norms[31] == 99.0


def test_hides_nothing_of_others_in_the_folder(run, read, tmp_path, age):
    """Beside a file of the user's own no restart is announced: it would hide their values."""
    with SummaryWriter(tmp_path) as summary_writer:
        for step in range(1, 11):
            summary_writer.add_scalar("loss", 1.0, step)
    age(tmp_path)
    write(tmp_path, run.batch(range(1, 11)))
    assert read(tmp_path).steps("loss") == list(range(1, 11))
    assert read(tmp_path).steps("gradwatch/grad_norm") == list(range(1, 11))


def test_optimizers_have_tags_of_their_own(run, read, tmp_path):
    """Two optimizers that step alternately at the same x have series that each rise."""
    labels = ["Adam", "Adam-1"]
    records = [
        run.record(step, optimizer=label, grad_norm=value)
        for step in range(1, 6)
        for label, value in zip(labels, [1.0, 2.0], strict=True)
    ]
    events = [run.event(2, optimizer="Adam", kind="exploding")]
    write(tmp_path, run.batch(records, events), block_every=1)
    reader = read(tmp_path)
    assert reader.series("gradwatch/grad_norm") == [(step, 1.0) for step in range(1, 6)]
    assert reader.series("gradwatch-Adam-1/grad_norm") == [(step, 2.0) for step in range(1, 6)]
    assert {tag.split("/")[0] for tag in reader.tags()} == {
        "gradwatch", "gradwatch_blocks", "gradwatch-Adam-1", "gradwatch-Adam-1_blocks",
    }  # fmt: skip
    assert all(rises(reader.steps(tag)) for tag in reader.tags())
    assert "Adam" not in reader.texts()[0][1]


def test_wall_time_is_that_of_the_step(run, read, tmp_path):
    """Steps of one batch are as far apart as they were in the training, and time only rises."""
    write(tmp_path, run.batch(range(1, 21)), run.batch(range(21, 41)))
    times = read(tmp_path).wall_times("gradwatch/grad_norm")
    assert times[19] - times[0] == pytest.approx(0.19, abs=1e-3)
    assert times == sorted(times)


def test_changed_layout_is_followed(make_run, read, tmp_path):
    """Blocks follow the parameters that a later batch has."""
    batches = [make_run(modules).batch(range(i, i + 10)) for i, modules in
               [(1, ["a", "b"]), (11, ["a", "b", "c"])]]  # fmt: skip
    write(tmp_path, *batches)
    assert read(tmp_path).steps("gradwatch_blocks/c") == [20]
    assert read(tmp_path).steps("gradwatch_blocks/a") == [10, 20]


def test_model_without_blocks(make_run, read, tmp_path):
    """A model of one module has scalars and no blocks."""
    write(tmp_path, make_run(["", ""]).batch(range(1, 21)))
    assert not [tag for tag in read(tmp_path).tags() if "blocks" in tag]


def test_an_explanation_is_in_the_text(read, tmp_path):
    """The Text dashboard has module, line, source and examples of what made a NaN."""
    model = zoo.small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer, sinks=[TensorBoardWriter(tmp_path)]) as watcher:
        model(torch.ones(2, 4)).square().mean().backward()
        watcher._run.explain(explanation(1))
        optimizer.step()
    ((step, text),) = read(tmp_path).texts()
    assert step == 1
    for part in ("**explained**", "encoder.norm", "model.py:42", "3 and 17", "scores.log()"):
        assert part in text

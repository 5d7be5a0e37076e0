"""A real TensorBoard on loopback, with its Python loader and with its data server."""

import math

import pytest

from gradwatch_tensorboard import TensorBoardWriter
from tests.support.board import LOADERS, Board

HOSTILE = '<img src=x onerror="alert(1)">.[a](javascript:b)'

ACCUMULATED = {"micro_batches": 2, "weight": 8.0, "noise_scale": 40.0, "noise_scale_stderr": 4.0}


def fill(folder, run, age):
    """Two optimizers, a NaN at step 40, and the second half of the run by a second writer."""
    for steps in (range(1, 31), range(21, 61)):
        writer = TensorBoardWriter(folder)
        for step in steps:
            if step == 40:
                batch = run.nan_step(40)
                events = [run.event(40, parameter=HOSTILE, message=HOSTILE)]
                writer.write(run.batch(batch.steps, events, batch.norms))
            else:
                writer.write(run.batch([run.record(step, **ACCUMULATED)]))
            writer.write(run.batch([run.record(step, optimizer="SGD-1", **ACCUMULATED)]))
        writer.close()
        age(folder)


@pytest.fixture(scope="module", params=LOADERS)
def server(request, tmp_path_factory, make_run, age):
    """A TensorBoard that has read the whole run."""
    logdir = tmp_path_factory.mktemp("server") / "runs"
    fill(logdir / "a", make_run(), age)
    with Board(logdir, request.param, wait=False) as server:
        server.wait(lambda: server.ask("scalars/tags").get("a"))
        server.wait(lambda: points(server, "gradwatch/grad_norm")[-1][0] == 60)
        yield server


def points(server, tag):
    """Step and value of each point of a scalar."""
    return [(step, value) for _, step, value in server.ask("scalars/scalars", run="a", tag=tag)]


def test_lists_the_tags(server):
    """TensorBoard lists each optimizer's scalars, blocks and events in groups of their own."""
    tags = server.ask("scalars/tags")["a"]
    groups = {tag.split("/")[0] for tag in tags}
    assert groups == {
        "gradwatch", "gradwatch_blocks", "gradwatch-SGD-1", "gradwatch-SGD-1_blocks",
    }  # fmt: skip
    assert {"gradwatch/clip_coef", "gradwatch/nonfinite_event"} <= set(tags)


def test_says_what_a_chart_means(server):
    """The meaning of a tag is shown with its chart, and its name is left as it is."""
    entry = server.ask("scalars/tags")["a"]["gradwatch/grad_norm"]
    assert "Total gradient norm <strong>before</strong> the clip" in entry["description"]
    assert entry["displayName"] in ("", "gradwatch/grad_norm")


def test_series_rise_across_the_resume(server):
    """Both loaders show each step once, although the first run had gone further."""
    for tag in server.ask("scalars/tags")["a"]:
        steps = [step for step, _ in points(server, tag)]
        assert steps == sorted(set(steps))
    assert [step for step, _ in points(server, "gradwatch/grad_norm")] == list(range(1, 61))


def test_shows_the_nan(server):
    """The NaN step is a NaN in the norm, and a point of the series of such steps."""
    norm = dict(points(server, "gradwatch/grad_norm"))
    assert norm[40] == "NaN" or math.isnan(norm[40])
    assert points(server, "gradwatch/nonfinite_event") == [(40, 1.0)]


def test_text_is_harmless(server):
    """A hostile name is text on the page of the event."""
    (entry,) = server.ask("text/text", run="a", tag="gradwatch/events/text_summary")
    assert entry["step"] == 40
    assert "<li>" in entry["text"]
    assert "<img" not in entry["text"]
    assert "<a" not in entry["text"]
    assert "&lt;img" in entry["text"]


def test_layout_finds_its_series(server):
    """Each chart of the Custom Scalars dashboard names tags that are there."""
    (category,) = server.ask("custom_scalars/layout")["category"]
    assert len(category["chart"]) == 4
    tags = set(server.ask("scalars/tags")["a"])
    for chart in category["chart"]:
        if "margin" in chart:
            (series,) = chart["margin"]["series"]
            assert set(series.values()) <= tags
            continue
        for regex in chart["multiline"]["tag"]:
            reply = server.ask("custom_scalars/scalars", run="a", tag=regex)
            assert len(reply["tag_to_events"]) >= 2

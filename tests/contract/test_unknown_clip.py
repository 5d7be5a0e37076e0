"""Steps of which it cannot be seen whether the loop clipped: no optimizer steps the model."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

import gradwatch
from gradwatch.adapters import LoggerScalars
from gradwatch.cli.main import main
from gradwatch.testing import CapturingSink


def _by_hand(steps=20, **options):
    """Trains without an optimizer, with a clip of the loop after each backward."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    with gradwatch.watch(model, **options) as watcher:
        for _ in range(steps):
            model.zero_grad()
            (model(torch.randn(16, 8)) - 3).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            for parameter in model.parameters():
                parameter.data.add_(parameter.grad, alpha=-0.01)
    return watcher


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A watcher that saw such a training, its run folder, and what a sink received."""
    folder, sink = tmp_path_factory.mktemp("run") / "run", CapturingSink()
    return _by_hand(run_dir=folder, sinks=[sink]), folder, sink


@pytest.fixture(params=["live", "folder"])
def history(run, request):
    """Its history, of the watcher or of the folder."""
    watcher, folder, _ = run
    return gradwatch.load(folder) if request.param == "folder" else watcher.history


def test_what_cannot_be_seen_is_unknown(history):
    """`clipped` is <NA>, and every number after the clip NaN; the norm before it is known."""
    steps = history.steps()
    assert set(steps["optimizer"]) == {"none"}
    assert steps["clipped"].dtype == "boolean"
    assert steps["clipped"].isna().all()
    assert steps["clip_coef"].isna().all()
    assert steps["grad_norm_clipped"].isna().all()
    assert (steps["grad_norm"] > 0.1).all()
    assert history.parameters()["grad_norm_clipped"].isna().all()
    assert (history.parameters()["grad_norm"] > 0).all()


def test_unknown_steps_count_neither_way(history):
    """They are no part of the clip rate, of advice, and of findings about the clip."""
    assert math.isnan(history.clip_rate())
    assert history.advice() == []
    assert not [one for one in history.report().findings if one.kind.startswith("clip")]


def test_plots_show_what_is_known(history):
    """The plots are drawn; there is no curve after the clip, and the share is not known."""
    from matplotlib import pyplot

    titles = [history.plot_clipping().get_title(loc="left")]
    labels = history.plot_norms().get_legend_handles_labels()[1]
    pyplot.close("all")
    assert titles == ["Clipping: not known"]
    assert not any("after the clip" in label for label in labels)


def test_the_dtype_does_not_depend_on_the_values():
    """`clipped` is pandas' nullable boolean in a run of known steps, and in an empty one."""
    x = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.1)
    with gradwatch.watch({"x": x}, optimizer, clip=0.5) as watcher:
        empty = watcher.history.steps()
        x.sum().backward()
        optimizer.step()
    steps = watcher.history.steps()
    assert empty["clipped"].dtype == steps["clipped"].dtype == "boolean"
    assert steps[steps["clipped"]].index.tolist() == [1]


def test_loggers_get_no_point_where_it_is_unknown(run):
    """Neither the coefficient nor the norm after the clip is logged; the norm before it is."""
    _, _, sink = run
    scalars = LoggerScalars()
    for record in sink.steps:
        assert record.clipped is None
        values = scalars.of(record)
        assert "gradwatch/grad_norm" in values
        assert not {"gradwatch/clip_coef", "gradwatch/grad_norm_clipped"} & values.keys()
        assert all(math.isfinite(value) for value in values.values())


def test_the_progress_bar_shows_the_norm_alone(run):
    """No factor of a clip that nobody has seen."""
    watcher, _, _ = run
    assert list(watcher.postfix()) == ["grad_norm"]


def _printed(capsys, *arguments):
    assert main(list(map(str, arguments))) == 0
    return capsys.readouterr().out


def test_tail_says_nothing_of_a_clip(run, capsys):
    """A line has the norm and no clip; in JSON the numbers after it are null."""
    _, folder, _ = run
    text = _printed(capsys, "tail", folder, "--once")
    assert text.count("norm") == 10
    assert "clipped" not in text
    lines = map(json.loads, _printed(capsys, "tail", folder, "--once", "--json").splitlines())
    steps = [line for line in lines if line["type"] == "step"]
    assert len(steps) == 10
    for step in steps:
        assert (step["clipped"], step["clip_coef"], step["grad_norm_clipped"]) == (None,) * 3


def test_compare_shows_a_dash(run, capsys, tmp_path):
    """The share of clipped steps is missing where none is known, beside a run that has one."""
    _, folder, _ = run
    x = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.1)
    with gradwatch.watch({"x": x}, optimizer, run_dir=tmp_path / "other"):
        x.sum().backward()
        optimizer.step()
    found = json.loads(_printed(capsys, "compare", folder, tmp_path / "other", "--json"))
    assert found["totals"]["clipped"] == [None, 0.0]
    assert "clip_coef" not in [column["column"] for column in found["steps"]["columns"]]
    rows = _printed(capsys, "compare", folder, tmp_path / "other").splitlines()
    (line,) = [line for line in rows if line.split()[:1] == ["clipped"]]
    assert line.split() == ["clipped", "-", "0", "%"]


def test_exports_keep_what_is_unknown(run, tmp_path, capsys):
    """An empty cell in CSV, null in JSON and in Parquet."""
    _, folder, _ = run
    rows = json.loads(_printed(capsys, "export", folder, "--format", "json"))
    assert {row["clipped"] for row in rows} == {None}
    _printed(capsys, "export", folder, "-o", tmp_path / "steps.csv")
    assert pd.read_csv(tmp_path / "steps.csv")["clipped"].isna().all()
    _printed(capsys, "export", folder, "-o", tmp_path / "steps.parquet")
    table = pd.read_parquet(tmp_path / "steps.parquet")
    assert table["clipped"].isna().all()
    assert len(table) == len(rows) == 20


def test_a_spike_of_which_it_is_unknown_is_told_as_such():
    """A spike is found, and counted neither as clipped nor as unclipped."""
    w = torch.ones(4, requires_grad=True)
    with gradwatch.watch({"w": w}) as watcher:
        for step in range(100):
            (w * (50.0 if step == 60 else 1.0 + 0.01 * (step % 7))).sum().backward()
            w.data.sub_(1e-3 * w.grad)
            w.grad = None
    (spike,) = [one for one in watcher.report().findings if one.kind == "spike"]
    assert spike.seen.numbers["applied_unclipped"] == 0
    assert "Whether a clip acted on them could not be seen." in spike.why
    assert np.isnan(watcher.last.clip_coef)

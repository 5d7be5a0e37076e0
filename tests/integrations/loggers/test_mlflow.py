"""MLflowSink with a real MLflow on a database: every row of both sides, whatever the server does."""

import logging
import math
import random
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import gradwatch

mlflow = pytest.importorskip("mlflow", reason="NOT TESTED: MLflowSink without MLflow")
pytest.importorskip("sqlalchemy", reason="NOT TESTED: MLflowSink without a database for MLflow")
pytest.importorskip("alembic", reason="NOT TESTED: MLflowSink without a database for MLflow")

from mlflow.utils.validation import _validate_metric_name  # noqa: E402

from gradwatch_loggers import MLflowSink, mlflow_sink  # noqa: E402
from gradwatch_loggers.mlflow_keys import MOST_CHARACTERS, MetricKeys  # noqa: E402

# Warnings of MLflow and SQLAlchemy about themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:sqlalchemy"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """A database of MLflow: making one takes seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    client = mlflow.MlflowClient(tracking_uri=uri)
    return uri, client.create_experiment("test", artifact_location=(folder / "artifacts").as_uri())


@pytest.fixture
def client(database, monkeypatch):
    """A client of that database, which is the one of the program as well."""
    uri, experiment = database
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment(experiment_id=experiment)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
    yield mlflow.MlflowClient()
    while mlflow.active_run() is not None:
        mlflow.end_run()
    mlflow.set_tracking_uri(before)


def history(client, run, key):
    """The rows of a metric, by step and time."""
    rows = client.get_metric_history(run.info.run_id, key)
    return sorted(rows, key=lambda row: (row.step, row.timestamp))


@pytest.mark.parametrize("deliver", ["batch", "step"])
def test_all_rows_of_both_sides_arrive(train, client, deliver):
    """200 of 200 rows of ours equal history.steps(), NaN too, and 200 of 200 of the user's are there."""
    with mlflow.start_run() as run:
        watcher, _ = train(
            MLflowSink(artifacts=False, deliver=deliver),
            steps=200,
            nan_at=(7,),
            before_step=lambda step: (
                mlflow.log_metric("loss", step / 3, step=step) if step % 10 == 0 else None
            ),
        )
    steps = watcher.history.steps()
    for column in ("grad_norm", "grad_norm_clipped", "clip_coef", "nonfinite_parameters"):
        rows = history(client, run, f"gradwatch/{column}")
        assert [row.step for row in rows] == list(range(1, 201))
        np.testing.assert_array_equal([row.value for row in rows], steps[column].to_numpy(float))
        assert all(a.timestamp <= b.timestamp for a, b in pairwise(rows))
    users = history(client, run, "loss")
    assert [(row.step, row.value) for row in users] == [(n, n / 3) for n in range(10, 201, 10)]
    assert client.get_run(run.info.run_id).data.tags["gradwatch.events"] == "1 nan, 1 skipped"


def test_infinity_is_the_largest_number(client, train):
    """MLflow holds no Inf: it is 1.8e308 there, as the page says."""
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        mlflow.start_run() as run,
        gradwatch.watch(model, optimizer, sinks=[MLflowSink(artifacts=False)], on_nonfinite="skip"),
    ):
        (model(torch.ones(1, 2)).sum() * math.inf).backward()
        optimizer.step()
    (row,) = history(client, run, "gradwatch/grad_norm")
    assert math.isnan(row.value) or row.value > 1.7e308


def test_the_report_is_an_artifact(train, client, tmp_path):
    """The run has the report, the events and, with matplotlib, the heat map at the end."""
    with mlflow.start_run() as run:
        watcher, _ = train(MLflowSink(), steps=30, nan_at=(7,))
    found = {one.path for one in client.list_artifacts(run.info.run_id, "gradwatch")}
    assert {"gradwatch/report.txt", "gradwatch/events.jsonl"} <= found
    path = client.download_artifacts(run.info.run_id, "gradwatch/report.txt", str(tmp_path))
    assert Path(path).read_text(encoding="utf-8").rstrip() == str(watcher.report()).rstrip()
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        return
    assert "gradwatch/norms.png" in found


def test_several_models_in_one_run(train, client):
    """With a prefix each has metrics, a tag and artifacts of its own."""
    with mlflow.start_run() as run:
        for name in ("G", "D"):
            train(MLflowSink(prefix=f"{name}/"), steps=3, nan_at=(2,))
    for name in ("G", "D"):
        assert len(history(client, run, f"{name}/gradwatch/grad_norm")) == 3
        tags = client.get_run(run.info.run_id).data.tags
        assert tags[f"{name}/gradwatch.events"] == "1 nan, 1 skipped"
        found = {one.path for one in client.list_artifacts(run.info.run_id, f"{name}/gradwatch")}
        assert f"{name}/gradwatch/report.txt" in found


def test_a_run_by_its_id(train, client):
    """Without an active run the sink writes to the one that it was given."""
    run = client.create_run(mlflow.get_experiment_by_name("test").experiment_id)
    train(MLflowSink(run.info.run_id, artifacts=False), steps=3)
    assert [row.step for row in history(client, run, "gradwatch/grad_norm")] == [1, 2, 3]
    assert mlflow.active_run() is None


def test_a_run_that_has_ended_takes_the_rest(client):
    """If the run is ended before the watcher is closed, no row is missing."""
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = mlflow.start_run()
    with gradwatch.watch(model, optimizer, sinks=[MLflowSink(artifacts=False)]) as watcher:
        for step in range(1, 11):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            if step == 2:
                watcher.flush()
            if step == 5:
                mlflow.end_run()
    assert [row.step for row in history(client, run, "gradwatch/grad_norm")] == list(range(1, 11))
    assert client.get_run(run.info.run_id).info.status == "FINISHED"


def test_the_run_is_the_one_of_the_first_step(client):
    """Short stages have a run each, and may end before steps are delivered by the dozen."""
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    sink = MLflowSink(artifacts=False)
    with gradwatch.watch(model, optimizer, sinks=[sink]) as watcher:
        with mlflow.start_run() as first:
            for _ in range(5):
                step()
        with mlflow.start_run() as second:
            for _ in range(5):
                step()
    assert sink.deliver == "batch"
    of_first = [row.value for row in history(client, first, "gradwatch/grad_norm")]
    assert of_first == watcher.history.steps()["grad_norm"].tolist()
    assert history(client, second, "gradwatch/grad_norm") == []


def test_without_a_run_it_warns_and_begins_with_one(client):
    """A run that is started later gets everything."""
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (  # noqa: PT031
        pytest.warns(gradwatch.GradwatchWarning) as told,
        gradwatch.watch(model, optimizer, sinks=[MLflowSink(artifacts=False)]) as watcher,
    ):
        for step in range(1, 5):
            if step == 3:
                run = mlflow.start_run()
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            watcher.flush()
    assert "no run of MLflow is active" in str(told[0].message)
    assert "works again" in str(told[1].message)
    assert [row.step for row in history(client, run, "gradwatch/grad_norm")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_server_that_is_away_costs_no_step(train, monkeypatch, client):
    """Weights and the generators of random numbers are as without the sink, and the loss is told."""
    random.seed(0)
    _, expected = train(steps=20)
    state = random.getstate()
    random.seed(0)
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    began = time.perf_counter()

    def is_fast(step):
        assert time.perf_counter() - began < 60

    sink = MLflowSink("a" * 32, wait_s=2.0)
    with pytest.warns(gradwatch.GradwatchWarning, match="MLflowSink.*lost 2. of 2. records"):
        watcher, weights = train(sink, steps=20, nan_at=(), before_step=is_fast)
    assert all(map(torch.equal, weights, expected))
    assert random.getstate() == state
    assert len(watcher.history.steps()) == 20


def test_a_slow_server_gets_many_steps_at_once(train, client, monkeypatch):
    """What has piled up goes with one request, of at most 500 metrics."""
    go, sizes = threading.Event(), []
    log_batch = mlflow.MlflowClient.log_batch

    def slow(self, run_id, metrics=(), **options):
        go.wait()
        sizes.append(len(metrics))
        return log_batch(self, run_id, metrics=metrics, **options)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", slow)
    with mlflow.start_run() as run:
        train(
            MLflowSink(artifacts=False, deliver="step"),
            steps=200,
            before_step=lambda step: go.set() if step == 200 else None,
        )
    assert len(history(client, run, "gradwatch/grad_norm")) == 200
    assert sum(sizes) == 200 * 4
    assert len(sizes) <= 12
    assert max(sizes) <= mlflow_sink.MOST_METRICS


def test_a_request_that_fails_half_way_leaves_no_row_twice(train, client, monkeypatch):
    """What the server has stored before an answer was lost is there once."""
    monkeypatch.setattr("gradwatch_loggers.background.PAUSE_S", 0.0)
    log_batch, calls = mlflow.MlflowClient.log_batch, []

    def forgetful(self, run_id, metrics=(), **options):
        calls.append(len(metrics))
        log_batch(self, run_id, metrics=metrics, **options)
        if len(calls) == 1:
            raise ConnectionError("the answer was lost")

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", forgetful)
    with mlflow.start_run() as run:
        train(MLflowSink(artifacts=False), steps=5)
    assert len(calls) > 1
    assert [row.step for row in history(client, run, "gradwatch/grad_norm")] == [1, 2, 3, 4, 5]


def test_blocks_have_names_that_mlflow_takes(client):
    """Norms of parts with brackets in their names arrive, each under a name of its own."""
    model = torch.nn.ModuleDict({"a[0]": torch.nn.Linear(2, 1), "a(0)": torch.nn.Linear(2, 1)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sink = MLflowSink(blocks=True, statistics=True, artifacts=False)
    with (
        mlflow.start_run() as run,
        gradwatch.watch(model, optimizer, sinks=[sink], statistics=("norm", "max")),
    ):
        for factor, part in enumerate(model.values(), start=1):
            (part(torch.ones(1, 2)).sum() * factor).backward()
        optimizer.step()
    (first,) = history(client, run, "gradwatch_blocks/a_0_")
    (second,) = history(client, run, "gradwatch_blocks/a_0_-2")
    assert (first.value, second.value) == pytest.approx((math.sqrt(3), 2 * math.sqrt(3)))
    assert len(history(client, run, "gradwatch_max/a_0_")) == 1


@pytest.mark.parametrize(
    "tag",
    ["a//b", "/a", "a/../b", "..", "a/", "a/./b", "a:b", "ä[ö]/ß", "x" * 300, "", "a\nb", "a?"],
)
def test_every_tag_has_a_name_that_mlflow_takes(tag):
    """Whatever a parameter is called, MLflow accepts it, and two never share a name."""
    keys = MetricKeys()
    names = [keys[tag], keys[tag + "!"], keys[tag + "?"], keys[tag]]
    assert len(set(names)) == 3
    for name in names:
        _validate_metric_name(name)
        assert len(name) <= MOST_CHARACTERS


def test_wrong_arguments_are_refused():
    """Each error names the argument and what to write."""
    with pytest.raises(TypeError, match=r"MLflowSink\(run_id\) must be the id of a run, got 3"):
        MLflowSink(3)
    with pytest.raises(ValueError, match=r"MLflowSink\(run_id\) must not be empty"):
        MLflowSink(" ")
    with pytest.raises(TypeError, match=r"MLflowSink\(prefix=\) must be a string, got None"):
        MLflowSink(prefix=None)
    with pytest.raises(TypeError, match=r"MLflowSink\(artifacts=\) must be True or False"):
        MLflowSink(artifacts="report")
    with pytest.raises(ValueError, match=r"MLflowSink\(deliver=\)"):
        MLflowSink(deliver="now")
    with pytest.raises(ValueError, match=r"MLflowSink\(wait_s=\) must be at least 0"):
        MLflowSink(wait_s=-1.0)

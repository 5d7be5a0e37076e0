"""PrometheusSink, read with Prometheus' own parser: a file, a port, a registry."""

import math
import socket
import urllib.request

import numpy as np
import pytest
import torch

import gradwatch
from gradwatch import Layout, RecordBatch, StepRecord

pytest.importorskip("prometheus_client", reason="NOT TESTED: PrometheusSink without its library")

from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from gradwatch_loggers import PrometheusSink
from gradwatch_loggers.prometheus_metrics import BOUNDS


def samples(text):
    """Every sample by its name and labels; each one once."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, *sorted(f"{k}={v}" for k, v in sample.labels.items())
            assert key not in found
            found[key] = sample.value
    return found


def batch(*records):
    """A batch of steps, without parameters."""
    empty = np.empty((len(records), 0))
    return RecordBatch(Layout((), ()), list(records), empty, empty)


def test_a_file_for_the_textfile_collector(train, tmp_path):
    """It has the newest step and counts of all of them, and says at the end that it is the end."""
    path = tmp_path / "collector" / "run.prom"
    sink = PrometheusSink(path, labels={"run": "a"})
    watcher, _ = train(sink, steps=30, nan_at=(7, 9))
    found = samples(path.read_text())
    steps = watcher.history.steps()
    of = ("optimizer=SGD", "run=a")
    assert found["gradwatch_training_running", "run=a"] == 0
    for column in ("grad_norm", "grad_norm_clipped", "clip_coef", "lr"):
        assert found[(f"gradwatch_{column}", *of)] == steps[column].iloc[-1]
    assert found[("gradwatch_global_step", *of)] == 30
    assert found[("gradwatch_steps_total", *of)] == 30
    assert found[("gradwatch_clipped_steps_total", *of)] == steps["clipped"].sum()
    assert found[("gradwatch_nonfinite_steps_total", *of)] == 2
    skips = {
        outcome: found[
            "gradwatch_skipped_steps_total", "optimizer=SGD", f"outcome={outcome}", "run=a"
        ]
        for outcome in ("skipped_nonfinite", "skipped_scaler", "skipped_policy")
    }
    assert skips == {"skipped_nonfinite": 2, "skipped_scaler": 0, "skipped_policy": 0}
    assert found[("gradwatch_events_total", "kind=nan", *of)] == 2
    assert found[("gradwatch_events_total", "kind=exploding", *of)] == 0
    assert list(path.parent.iterdir()) == [path]


def test_every_finite_norm_is_in_the_histogram(train):
    """Buckets, count and sum are those of all finite norms; a NaN does not spoil the sum."""
    registry = CollectorRegistry()
    sink = PrometheusSink(registry=registry)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer, sinks=[sink], on_nonfinite="skip") as watcher:
        for step in range(20):
            factor = math.nan if step == 3 else 10.0 ** (step - 10)
            (model(torch.ones(2, 4)).sum() * factor).backward()
            optimizer.step()
            optimizer.zero_grad()
        watcher.flush()
        found = samples(generate_latest(registry).decode())
    norms = watcher.history.steps()["grad_norm"].dropna()
    assert found["gradwatch_grad_norms_count", "optimizer=SGD"] == 19
    assert found["gradwatch_grad_norms_sum", "optimizer=SGD"] == pytest.approx(norms.sum())
    for bound in (*BOUNDS, math.inf):
        le = "+Inf" if math.isinf(bound) else bound
        bucket = found["gradwatch_grad_norms_bucket", f"le={le}", "optimizer=SGD"]
        assert bucket == (norms <= bound).sum()


def test_a_nan_is_a_nan(train):
    """The gauge of a NaN norm is NaN, and the counter to alert on has risen."""
    registry = CollectorRegistry()
    sink = PrometheusSink(registry=registry)
    sink.write(batch(StepRecord(1, "SGD", grad_norm=math.nan, nonfinite_parameters=2)))
    found = samples(generate_latest(registry).decode())
    assert math.isnan(found["gradwatch_grad_norm", "optimizer=SGD"])
    assert found["gradwatch_nonfinite_steps_total", "optimizer=SGD"] == 1
    sink.write(batch(StepRecord(2, "SGD", grad_norm=math.inf)))
    assert registry.get_sample_value("gradwatch_grad_norm", {"optimizer": "SGD"}) == math.inf
    sink.close()


def test_a_port_is_served_during_the_training():
    """GET /metrics shows the steps so far; the port is closed at the end."""
    sink = PrometheusSink(port=0)
    assert sink.port is None
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer, sinks=[sink]) as watcher:
        for step in (1, 2):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            watcher.flush()
            url = f"http://127.0.0.1:{sink.port}/metrics"
            with urllib.request.urlopen(url, timeout=60) as answer:
                found = samples(answer.read().decode())
            assert found["gradwatch_steps_total", "optimizer=SGD"] == step
            assert found["gradwatch_training_running",] == 1
        port = sink.port
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", port))


def test_a_port_that_is_taken_costs_no_step(train):
    """The watcher warns, and the training goes on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        sink = PrometheusSink(port=taken.getsockname()[1])
        with pytest.warns(gradwatch.GradwatchWarning) as told:
            watcher, _ = train(sink, steps=3)
    assert all("PrometheusSink" in str(one.message) for one in told)
    assert "Lost: steps 3" in str(told[-1].message)
    assert len(watcher.history.steps()) == 3


def test_the_default_registry_has_it_until_the_end(train):
    """Without a place the metrics are where the program's own are."""

    def look(step):
        assert (step > 1) == ("gradwatch_steps_total" in generate_latest(REGISTRY).decode())

    train(PrometheusSink(deliver="step"), steps=3, before_step=look)
    assert "gradwatch_" not in generate_latest(REGISTRY).decode()


def test_a_batch_that_comes_again_counts_once(tmp_path):
    """After an error in writing, the same batch is not counted twice."""
    folder = tmp_path / "folder"
    sink = PrometheusSink(folder / "run.prom")
    folder.touch()
    first = batch(StepRecord(1, "SGD"))
    with pytest.raises(OSError, match=r"folder"):
        sink.write(first)
    folder.unlink()
    sink.write(first)
    sink.close()
    found = samples((folder / "run.prom").read_text())
    assert found["gradwatch_steps_total", "optimizer=SGD"] == 1


def test_blocks_statistics_and_several_optimizers():
    """Each part of the model has its norm, and what was last taken of a statistic stays."""
    registry = CollectorRegistry()
    model = torch.nn.ModuleDict({"D": torch.nn.Linear(2, 1), "G": torch.nn.Linear(2, 1)})
    both = {name: torch.optim.SGD(part.parameters(), lr=0.1) for name, part in model.items()}
    sink = PrometheusSink(registry=registry, blocks=True, statistics=True)
    options = {"statistics": ("norm", "max"), "every": 2}
    with gradwatch.watch(model, list(both.values()), sinks=[sink], **options) as watcher:
        for _ in range(4):
            for name, optimizer in both.items():
                model[name](torch.ones(1, 2)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        watcher.flush()
        found = samples(generate_latest(registry).decode())
    for optimizer, block in (("SGD", "D"), ("SGD-1", "G")):
        labels = f"block={block}", f"optimizer={optimizer}"
        assert found[("gradwatch_block_norm", *labels)] == pytest.approx(math.sqrt(3))
        assert found[("gradwatch_block_max", *labels)] == 1
        assert found["gradwatch_steps_total", labels[1]] == 4


def test_several_models_share_a_registry():
    """Each has its labels; a second sink with the same ones is told, and costs no step."""
    registry = CollectorRegistry()
    sinks = [PrometheusSink(registry=registry, labels={"model": name}) for name in "ab"]
    for number, sink in enumerate(sinks, start=1):
        sink.write(batch(StepRecord(1, "SGD", grad_norm=float(number))))
    found = samples(generate_latest(registry).decode())
    assert found["gradwatch_grad_norm", "model=a", "optimizer=SGD"] == 1
    assert found["gradwatch_grad_norm", "model=b", "optimizer=SGD"] == 2
    with pytest.raises(ValueError, match="Give each model labels of its own"):
        PrometheusSink(registry=registry, labels={"model": "a"}).write(batch(StepRecord(1, "SGD")))
    sinks[0].close()
    found = samples(generate_latest(registry).decode())
    assert {key[1] for key in found} == {"model=b"} | {
        key[1] for key in found if key[1].startswith(("kind", "le"))
    }
    sinks[1].close()
    assert generate_latest(registry) == b""


def test_wrong_arguments_are_refused(tmp_path):
    """Each error names the argument and what to write."""
    with pytest.raises(ValueError, match=r"got path= and port=, and shows the metrics in one way"):
        PrometheusSink("run.prom", port=9400)
    with pytest.raises(ValueError, match=r"must end in .prom.*Write '.*run.prom'"):
        PrometheusSink("run.txt")
    with pytest.raises(TypeError, match=r"PrometheusSink\(port=\) must be a number, got '9400'"):
        PrometheusSink(port="9400")
    with pytest.raises(ValueError, match=r"port=\) must be from 0 to 65535, got 70000"):
        PrometheusSink(port=70_000)
    with pytest.raises(TypeError, match=r"registry=\) must be a CollectorRegistry"):
        PrometheusSink(registry="default")
    with pytest.raises(TypeError, match=r"address=\) must be a string"):
        PrometheusSink(port=0, address=1)
    with pytest.raises(TypeError, match=r"labels=\) must be a dict of strings"):
        PrometheusSink(labels={"rank": 0})
    for label in ("", "1a", "a-b", "__a", "kind"):
        with pytest.raises(ValueError, match=r"labels=\) got the label"):
            PrometheusSink(labels={label: "x"})
    with pytest.raises(ValueError, match=r"deliver=\)"):
        PrometheusSink(deliver="never")

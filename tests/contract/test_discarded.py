"""Where a gradient that was thrown away is seen: in every sink, in pages of the shell, in copies."""

import json
import math
from collections import Counter

import pytest
import torch

import gradwatch
from gradwatch.cli.main import main
from gradwatch.testing import CapturingSink, late_readings
from tests.support import zoo


def _guarded(watcher, model, optimizer, batches=40, bad_every=4):
    """Trains; every fourth batch is bad, and its step is left out."""
    generator = torch.Generator().manual_seed(0)
    for number in range(1, batches + 1):
        x = torch.randn(8, 4, generator=generator)
        if number % bad_every == 0:
            x[0, 0] = math.nan
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        if math.isfinite(loss.item()):
            optimizer.step()
    return watcher


@pytest.fixture
def folder(tmp_path):
    """A run folder of such a training: 30 steps, 10 gradients thrown away."""
    model = zoo.small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.watch(model, optimizer, run_dir=tmp_path / "run") as watcher:
        _guarded(watcher, model, optimizer)
    return tmp_path / "run"


def test_a_run_folder_has_what_the_memory_has(folder):
    """Events and counts of thrown-away gradients; no row of steps, no gap in their numbers."""
    history = gradwatch.load(folder)
    assert list(history.steps().index) == list(range(1, 31))
    assert history.steps()["discarded"].sum() == 9  # the last one has no step after it
    assert Counter(history.events()["kind"]) == {"nan": 10, "discarded": 10}
    (finding,) = history.report().of_kind("discarded")
    assert finding.seen.numbers["discarded"] == 10
    assert finding.seen.numbers["nonfinite"] == 10


def test_the_shell_shows_them(folder, capsys):
    """gradwatch tail prints the events, gradwatch report the finding."""
    assert main(["tail", str(folder), "--once"]) == 0
    assert "thrown away" in capsys.readouterr().out
    main(["report", str(folder), "--json"])
    assert "discarded" in json.loads(capsys.readouterr().out)["kinds"]


def test_a_sink_gets_them_though_no_step_ever_comes():
    """Of a loop that throws everything away, too, and not only at the end."""
    model, sink = zoo.small(), CapturingSink()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with (
        pytest.warns(gradwatch.GradwatchWarning, match="never stepped"),
        gradwatch.watch(model, optimizer, sinks=[sink]) as watcher,
    ):
        _guarded(watcher, model, optimizer, batches=60, bad_every=1)
    kinds = Counter(event.kind for batch in sink.batches for event in batch.events)
    assert kinds["discarded"] == kinds["nan"] == 60
    assert not sink.steps


@pytest.mark.slow
def test_the_count_is_exact_where_memory_keeps_a_part_of_the_events():
    """Of 12,000 events memory keeps 10,000; the steps count all that was thrown away."""
    x = torch.ones(2, requires_grad=True)
    y = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.SGD([x, y], lr=0.0)
    with gradwatch.watch({"x": x, "y": y}, optimizer) as watcher:
        for number in range(12_000):
            optimizer.zero_grad()
            (x.sum() + y.sum()).backward()
            if number % 3_000 == 2_999:
                optimizer.step()
    assert watcher.history.steps()["discarded"].sum() == 12_000 - 4
    assert len(watcher.events) == 10_000
    assert watcher.report().of_kind("discarded")[0].seen.numbers["discarded"] == 12_000 - 4


def test_it_is_known_before_the_next_step_comes():
    """At the second backward the first one, which zero_grad() has thrown away, can be read."""
    model = zoo.small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.watch(model, optimizer) as watcher:
        model(torch.ones(2, 4)).sum().backward()
        optimizer.zero_grad()
        assert not watcher.events
        model(torch.ones(2, 4)).sum().backward()
        assert [event.kind for event in watcher.events] == ["discarded"]
        optimizer.step()
    assert [event.kind for event in watcher.events] == ["discarded"]


@pytest.mark.parametrize("named", [True, False])
def test_two_optimizers_each_have_their_own(named):
    """What was thrown away before their first steps is told of both, with the norm of each part."""
    model = zoo.small()
    parts = [list(model[0].parameters()), list(model[2].parameters())]
    optimizers = [torch.optim.SGD(part, lr=0.01) for part in parts]
    norms = []
    with gradwatch.watch(model, optimizers if named else None) as watcher:
        for throws in (True, True, False):
            model.zero_grad()
            model(torch.ones(2, 4)).sum().backward()
            if throws:
                norms += [torch.cat([p.grad.flatten() for p in part]).norm() for part in parts]
                continue
            for optimizer in optimizers:
                optimizer.step()
    told = [event for event in watcher.events if event.kind == "discarded"]
    assert sorted(event.value for event in told) == pytest.approx(sorted(map(float, norms)))
    assert Counter(event.optimizer for event in told) == {"SGD": 2, "SGD-1": 2}
    assert watcher.history.steps()["discarded"].tolist() == [2, 2]


def test_nothing_waits_for_a_device():
    """Where numbers arrive late, a thrown-away gradient is recorded when its norm has arrived."""
    model = zoo.small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with late_readings(2), gradwatch.watch(model, optimizer) as watcher:
        _guarded(watcher, model, optimizer, batches=8)
    kinds = [event.kind for event in watcher.events]
    assert kinds == ["nan", "discarded"] * 2


def test_a_caught_error_tells_each_thing_once():
    """on_nonfinite="raise", caught by the loop: one nan event, and that the gradient was left."""
    model = zoo.small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.watch(model, optimizer, on_nonfinite="raise") as watcher:
        for bad in (False, True, False):
            optimizer.zero_grad()
            model(torch.full((2, 4), math.nan if bad else 1.0)).sum().backward()
            try:
                optimizer.step()
            except gradwatch.NonFiniteGradientError:
                assert bad
    assert [event.kind for event in watcher.events] == ["nan", "discarded"]
    assert list(watcher.history.steps().index) == [1, 2]

"""The benchmark of recovery: what it reads off a run, and that the script itself runs."""

from __future__ import annotations

import math
import sys

import pytest
import torch

import gradwatch

pytest.importorskip("matplotlib")


@pytest.mark.slow
def test_script_trains_prints_and_draws(tmp_path, monkeypatch, capsys):
    """A short benchmark prints its tables, draws, and takes no run up again that it has."""
    from benchmarks.spikes import __main__ as spikes

    picture, results = tmp_path / "picture.png", tmp_path / "runs.jsonl"
    options = ["--seeds", 1, "--steps", 100, "--jobs", 1, "--optimizer", "SGD", "--no-norms"]
    options += ["--policies", 'clip="auto"', "--results", results, "--plot", picture]
    monkeypatch.setattr(sys, "argv", ["benchmarks.spikes", *map(str, options)])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    spikes.main()
    printed = capsys.readouterr().out
    for text in ('| clip="auto" | ', "1/1 equal", "0 of 100 changed"):
        assert text in printed
    assert picture.stat().st_size > 10_000

    args = spikes.parse_arguments(list(map(str, options)))
    lines = results.read_text().splitlines()
    results.write_text("\n".join(lines[:-1]) + "\n")
    runs = spikes.run_all(spikes.tasks_of(args), 1, results)
    assert len(runs) == len(lines) == 9
    assert results.read_text().splitlines() == lines


def test_too_few_steps_are_refused(capsys):
    """Spikes need room before and after them."""
    from benchmarks.spikes import __main__ as spikes

    with pytest.raises(SystemExit):
        spikes.parse_arguments(["--steps", "50"])
    assert "at least 100, got 50" in capsys.readouterr().err


def test_noise_is_as_large_as_it_is_said_to_be():
    """The gradient of a corrupted loss is the clean one plus noise of the given norm."""
    from benchmarks.spikes import training

    torch.manual_seed(0)
    task = training.Task("no clip", "burst", "SGD", seed=0, steps=300)
    model, batch = training.CharLSTM(), torch.randint(128, (2, 33))
    norms = {}
    for step in (task.middle, task.middle + 1):
        parameters = list(model.parameters())
        loss = training.corrupted_loss(task, step, model, batch, usual=100.0)
        gradients = torch.autograd.grad(loss, parameters)
        norms[step] = torch.cat([g.flatten() for g in gradients]).norm().item()
    assert norms[task.middle] < 10
    assert norms[task.middle + 1] == pytest.approx(3000.0, rel=1e-2)


def test_steps_to_recover():
    """Recovered is within three hundredths of the run without spikes, and staying there."""
    from benchmarks.spikes import measures

    clean = [(5, 2.0), (10, 2.0), (15, 1.9), (20, 1.8)]

    def recovery(*losses: float) -> float:
        return measures.steps_to_recover(
            list(zip((5, 10, 15, 20), losses, strict=True)), clean, last=10
        )

    assert recovery(9.0, 2.05, 1.95, 1.85) == 0
    assert recovery(2.0, 3.0, 1.95, 1.85) == 5
    assert recovery(2.0, 2.0, 1.99, 1.85) == 10
    assert math.isinf(recovery(2.0, 2.0, 1.9, 1.9))
    assert math.isinf(recovery(2.0, 2.0, math.nan, math.nan))


def test_steps_to_stop():
    """A policy has stopped where it acts as rarely as before; one that always acts cannot."""
    from benchmarks.spikes import measures

    quiet, busy = [False] * 50, [True] * 50
    assert measures.steps_to_stop(quiet + [True] * 30 + quiet, 50) == 28
    assert math.isinf(measures.steps_to_stop(quiet + busy, 50))
    assert math.isnan(measures.steps_to_stop(busy + busy, 50))


def test_clips_in_spiked_and_in_skipped_steps_are_not_false():
    """Only clips of steps that were taken and not corrupted count."""
    from benchmarks.spikes import measures
    from benchmarks.spikes.training import Run, Task

    task = Task("no clip", "early", "SGD", seed=0, steps=300)
    run = Run(clipped=[True] * 12, applied=[True] * 11 + [False])
    assert measures.false_clips(task, run) == [True] * 10


def test_norms_alone():
    """On norms alone a fixed limit depends on their scale, and the automatic one does not."""
    from benchmarks.spikes import norm_sequences as norms

    steady = norms.lognormal(0, 20_000, spread=0.5)
    assert torch.tensor(steady).std().item() == pytest.approx(
        0.5 * torch.tensor(steady).mean().item(), rel=0.05
    )
    assert norms.changed_by_scale(lambda: gradwatch.ClipByNorm(5.0), 100.0) > 0
    assert norms.factors(lambda: gradwatch.ClipByNorm(5.0), [1.0, 10.0]) == [
        1.0,
        pytest.approx(0.5),
    ]

"""Sentences of README.md and docs/ that no other test shows."""

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gradwatch

from .poison import bad_events


def with_norms(norms: list[float], **options: Any) -> gradwatch.Watcher:
    """Run steps whose gradient norms are these."""
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], 0.0)
    with gradwatch.watch({"weight": weight}, optimizer, **options) as watcher:
        for norm in norms:
            optimizer.zero_grad()
            (weight * norm).sum().backward()
            optimizer.step()
    return watcher


def usual_norms(count: int) -> list[float]:
    """Return norms that scatter by 15 % around 1."""
    return [float(n) for n in np.exp(0.15 * np.random.default_rng(0).standard_normal(count))]


def network() -> tuple[nn.Sequential, torch.optim.Optimizer]:
    """Return a small network and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    return model, torch.optim.SGD(model.parameters(), 0.01)


def test_the_warm_up_of_the_automatic_clip() -> None:
    """clipping.md: three norms pass; until there are 25, more than 4 medians become the median."""
    steps = with_norms([5.0, 500.0, 7.0], clip="auto").history.steps()
    assert not steps["clipped"].any()
    steps = with_norms([1.0, 1.0, 1.0, 10.0, 3.9, 4.1], clip="auto").history.steps()
    assert steps["clipped"].tolist() == [False, False, False, True, False, True]
    assert steps["grad_norm_clipped"][4] == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("rise", [1.5, 2, 3, 10, 1e6])
def test_a_lasting_rise_is_clipped_for_half_of_the_memory_at_most(rise: float) -> None:
    """clipping.md: clipping stops after at most 33 steps, however high the rise is."""
    norms = usual_norms(64)
    steps = with_norms(norms + [rise * n for n in norms], clip="auto").history.steps()
    clipped = steps["clipped"].tolist()[64:]
    quiet = next(i for i in range(len(clipped)) if not any(clipped[i : i + 5]))
    assert quiet <= 33


def test_a_burst_is_clipped_to_its_end() -> None:
    """clipping.md: of 20 steps with 30 times the usual norm, all are clipped."""
    norms = usual_norms(64)
    steps = with_norms(norms + [30 * n for n in norms[:20]], clip="auto").history.steps()
    assert steps["clipped"][64:].all()


def test_the_eleventh_spike_in_a_row_is_taken() -> None:
    """clipping.md: ten finite outliers in a row are a rise and not a spike."""
    watcher = with_norms([*usual_norms(128), *[1e3] * 11], skip_spikes="auto")
    assert watcher.history.steps()["outcome"].tolist()[128:] == ["skipped_policy"] * 10 + [
        "applied"
    ]


def test_what_is_told_of_gradients_that_were_set_by_hand() -> None:
    """settings.md: no backward was seen: no micro-batch, hence no order and no batch to look at."""
    model, optimizer = network()
    with gradwatch.watch(model, optimizer) as watcher:
        loss = model(torch.randn(4, 3)).mean() * math.nan
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    assert watcher.history.steps()["micro_batches"].tolist() == [0]
    event = bad_events(watcher).iloc[0]
    assert event["micro_batch"] == 0
    assert "first in backward order" not in event["message"]
    assert "micro-batch" not in watcher.report().findings[0].advice


def test_the_folder_gives_the_same_answers(tmp_path: Path) -> None:
    """plain-loop.md: a run folder receives everything: frames and report are those of the live run."""
    model, optimizer = network()
    with gradwatch.watch(
        model, optimizer, run_dir=tmp_path / "run", statistics=("norm", "max")
    ) as watcher:
        for step in range(25):
            optimizer.zero_grad()
            x = torch.randn(4, 3) * (math.nan if step == 20 else 1)
            model(x).square().mean().backward()
            optimizer.step()
    loaded, live = gradwatch.load(tmp_path / "run"), watcher.history
    assert loaded.steps().drop(columns="time_s").equals(live.steps().drop(columns="time_s"))
    assert loaded.parameters().equals(live.parameters())
    assert loaded.events().equals(live.events())
    assert str(loaded.report()) == str(live.report())


def test_a_write_past_the_counter_is_seen_at_the_next_look() -> None:
    """limits.md: a clip through .data from step 5 on is recorded from the look in step 8 on."""
    model, optimizer = network()
    with gradwatch.watch(model, optimizer) as watcher:
        for step in range(1, 13):
            optimizer.zero_grad()
            model(torch.randn(4, 3)).square().mean().backward()
            for parameter in model.parameters() if step >= 5 else ():
                assert parameter.grad is not None
                parameter.grad.data.mul_(0.5)
            optimizer.step()
    assert watcher.history.steps()["clip_coef"].tolist() == [1.0] * 7 + [0.5] * 5


def test_a_missing_zero_grad_is_told_after_ten_steps() -> None:
    """warnings.md: after ten steps in a row that begin with the gradients of the step before."""
    model, optimizer = network()
    told = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with gradwatch.watch(model, optimizer):
            for _ in range(13):
                model(torch.randn(4, 3)).square().mean().backward()
                optimizer.step()
                told.append(len(caught))
    assert told == [0] * 10 + [1] * 3


def test_parameters_that_join_are_clipped_from_their_first_step_on() -> None:
    """warnings.md: parameters that join by add_param_group() are in the norm and in the clip."""
    model, optimizer = network()
    joining = nn.Linear(3, 1)
    norms = []
    with gradwatch.watch(nn.ModuleList([model, joining]), optimizer, clip=0.01) as watcher:
        for step in range(5):
            if step == 3:
                optimizer.add_param_group({"params": joining.parameters(), "lr": 0.5})
            optimizer.zero_grad()
            joining.zero_grad()
            x = torch.randn(4, 3)
            (model(x) + joining(x)).square().mean().backward()
            parameters = [*model.parameters(), *(joining.parameters() if step >= 3 else ())]
            gradients = [p.grad for p in parameters if p.grad is not None]
            norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in gradients)))
            optimizer.step()
    steps = watcher.history.steps()
    assert steps["grad_norm"].tolist() == pytest.approx(norms)
    assert steps["clip_coef"].tolist() == pytest.approx([0.01 / n for n in norms], rel=1e-4)

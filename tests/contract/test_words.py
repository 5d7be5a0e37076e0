"""What a newcomer reads: errors that say what to write and show no tensors, and what objects hold."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import gradwatch

LARGE = torch.zeros(600, 600)
LAYER = torch.nn.Linear(512, 512)


@pytest.fixture(scope="module")
def watcher() -> gradwatch.Watcher:
    """A watcher after one step."""
    model = torch.nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer) as watcher:
        model(torch.ones(4, 8)).mean().backward()
        optimizer.step()
    return watcher


ONE_NAME = {
    "steps": lambda history: history.steps("grad_norm"),
    "parameters": lambda history: history.parameters(columns="grad_norm"),
    "a wrong one": lambda history: history.steps("grad_nrm"),
}


@pytest.mark.parametrize("call", ONE_NAME)
def test_one_name_where_several_are_meant(call: str, watcher: gradwatch.Watcher) -> None:
    """The message has the list to write."""
    with pytest.raises(TypeError, match=r'Write \["grad_norm"\]\.'):
        ONE_NAME[call](watcher.history)


WRONG: dict[str, Callable[[gradwatch.Watcher], Any]] = {
    "watch(list)": lambda w: gradwatch.watch(list(LAYER.parameters())),
    "watch(mapping)": lambda w: gradwatch.watch({"a": [LARGE]}),
    "watch(optimizer=)": lambda w: gradwatch.watch(LAYER, list(LAYER.parameters())),
    "watch(clip=)": lambda w: gradwatch.watch(LAYER, clip=LARGE),
    "watch(accumulate=)": lambda w: gradwatch.watch(LAYER, accumulate=LARGE),
    "watch(statistics=)": lambda w: gradwatch.watch(LAYER, statistics=LARGE),
    "watch(every=)": lambda w: gradwatch.watch(LAYER, every=LARGE),
    "watch(sinks=)": lambda w: gradwatch.watch(LAYER, sinks=[LARGE]),
    "watch(exploding_norm=)": lambda w: gradwatch.watch(LAYER, exploding_norm=LARGE),
    "steps(columns=)": lambda w: w.history.steps(LARGE),
    "steps(start=)": lambda w: w.history.steps(start=LARGE),
    "parameters(names=)": lambda w: w.history.parameters(LAYER.weight),
    "parameters(several)": lambda w: w.history.parameters([LAYER.weight]),
    "clip_rate()": lambda w: w.history.clip_rate(LARGE),
    "report()": lambda w: w.history.report(LARGE),
    "Thresholds()": lambda w: gradwatch.Thresholds(spike=LARGE),
    "load()": lambda w: gradwatch.load(LARGE),
    "load_state_dict()": lambda w: w.load_state_dict(list(LAYER.parameters())),
    "ClipByNorm()": lambda w: gradwatch.ClipByNorm(LARGE),
    "AccumulateByNoiseScale()": lambda w: gradwatch.AccumulateByNoiseScale(min=LARGE),
    "CurvatureEvery()": lambda w: gradwatch.CurvatureEvery(2, LARGE),
    "RunFolder()": lambda w: gradwatch.RunFolder(LARGE),
    "curvature()": lambda w: gradwatch.curvature(list(LAYER.parameters()), lambda: LARGE),
    "check_gradients(samples=)": lambda w: gradwatch.check_gradients(LAYER, LARGE, samples=LARGE),
}


@pytest.mark.parametrize("call", WRONG)
def test_messages_show_no_tensors(call: str, watcher: gradwatch.Watcher) -> None:
    """A tensor in the wrong place is shown by its shape, in a message that can be read."""
    with pytest.raises((TypeError, ValueError)) as caught:
        WRONG[call](watcher)
    assert "tensor(" not in str(caught.value)
    assert len(str(caught.value)) < 450


def test_an_unknown_limit_is_named_with_the_known_ones(watcher: gradwatch.Watcher) -> None:
    """report(spke=...) lists the limits."""
    with pytest.raises(TypeError, match=r"got a limit 'spke', which is none of: .*spike"):
        watcher.report(spke=3)


def test_objects_say_what_they_hold(watcher: gradwatch.Watcher, tmp_path: Any) -> None:
    """The repr of what a user holds names its contents, before, during and after a run."""
    new = gradwatch.watch(torch.nn.Linear(8, 1))
    assert repr(new) == "Watcher(Linear of 2 parameters, no optimizer yet, not entered)"
    assert repr(watcher) == "Watcher(Linear of 2 parameters, SGD at step 1, closed)"
    assert repr(watcher.history) == "History(1 steps, 2 parameters, 0 events)"
    assert repr(watcher.report()) == "Report(1 step, 2 parameters, 0 findings)"
    assert repr(gradwatch.RunFolder(tmp_path / "run")) == f"RunFolder('{tmp_path / 'run'}')"
    assert repr(gradwatch.Thresholds()).startswith("Thresholds(few_steps=20, ")

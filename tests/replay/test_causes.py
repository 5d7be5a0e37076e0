"""About a hundred causes of NaN and Inf as they are written, and that each of them is found."""

import pytest
import torch

import gradwatch
from tests.replay.causes import CAUSES
from tests.support.state import differences, state_of

IN_A_LOOP = [one for one in CAUSES if one.loop]


@pytest.mark.parametrize("cause", CAUSES, ids=lambda one: one.name)
def test_the_cause_is_found(cause):
    """`gradwatch.explain` names what was bad first: the operation with its line, the data, or the weights."""
    training = cause.begin()
    explanation = gradwatch.explain(
        training.model, *training.args, loss=training.loss, **training.kwargs
    )
    assert explanation.origin == cause.origin, str(explanation)
    _check(cause, explanation)


@pytest.mark.parametrize("cause", IN_A_LOOP, ids=lambda one: one.name)
def test_a_loop_finds_it_and_goes_on_as_without(cause):
    """`on_nonfinite="explain"` says the same, and the training is that of `"skip"` to the bit."""
    skipped, none = _train(cause, "skip")
    state, explanations = _train(cause, "explain")
    assert list(differences(skipped, state)) == []
    assert none == ()
    assert [one.origin for one in explanations] == [cause.loop]
    if cause.loop == cause.origin:
        _check(cause, explanations[0])


def _train(cause, on_nonfinite):
    """Two steps, the second of which has random gradients: it shows what the first one left."""
    training = cause.begin()
    optimizer = torch.optim.SGD(training.model.parameters(), lr=0.1, momentum=0.9)
    with gradwatch.watch(training.model, optimizer, on_nonfinite=on_nonfinite) as watcher:
        training.value().backward()
        optimizer.step()
        for parameter in training.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return state_of(training.model, optimizer), tuple(watcher.explanations)


def _check(cause, explanation):
    told = str(explanation)
    assert not explanation.candidates, told
    if cause.origin == "operation":
        assert explanation.operation == cause.operation, told
    if "born" in cause.lines:
        assert (explanation.file, explanation.line) == (cause.file, cause.lines["born"]), told
    for name in ("phase", "module", "examples"):
        if getattr(cause, name) is not None:
            assert getattr(explanation, name) == getattr(cause, name), told
    if cause.origin in ("input", "weights"):
        assert explanation.argument == cause.argument, told
        assert explanation.parameter == cause.parameter, told
    if "possible" in cause.lines:
        assert explanation.made_possible_by is not None, told
        assert explanation.made_possible_by.line == cause.lines["possible"], told

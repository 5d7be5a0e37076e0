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


class TimeFirst(torch.nn.Module):
    """A recurrent layer that takes the time first; the square root of a row of zeros."""

    def __init__(self, turns):
        super().__init__()
        self.layer = torch.nn.GRU(4, 4)
        self.turns = turns

    def forward(self, x):
        x = x.transpose(0, 1) if self.turns else x
        kept = x.abs().sum(-1, keepdim=True) > 0
        return (self.layer(x)[0] * kept).pow(2).sum(-1).sqrt().mean()


@pytest.mark.parametrize(("turns", "examples"), [(True, (1,)), (False, ())])
def test_the_batch_is_not_taken_for_the_time(turns, examples):
    """No example is named where a layer that takes the time first is given dimension 0 as such."""
    torch.manual_seed(0)
    x = torch.randn(3, 5, 4)
    x[1, 2] = 0
    found = gradwatch.explain(TimeFirst(turns), x)
    assert (found.operation, found.examples) == ("sqrt", examples)

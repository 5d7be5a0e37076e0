"""How many micro-batches the backwards of a step are."""

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.accumulate.counting import count_micro_batches

BODY, HEAD = frozenset(range(10)), frozenset({10, 11})
ALL = BODY | HEAD
EMBEDDING = frozenset({0})
EXPERT = frozenset({4, 5})
CASES = {
    "nothing": ([], 0),
    "one": ([ALL], 1),
    "alike": ([ALL] * 4, 4),
    "chunks of a head": ([*[HEAD] * 8, BODY], 1),
    "two batches in chunks": ([*[HEAD] * 8, BODY] * 2, 2),
    "chunks of a head that is the embedding": ([*[EMBEDDING] * 8, BODY] * 2, 2),
    "few layers by chance": ([EMBEDDING, BODY], 2),
    "few layers by chance, twice": ([EMBEDDING, EMBEDDING, BODY, BODY], 4),
    "disjoint models": ([HEAD, BODY], 1),
    "disjoint models, accumulated": ([HEAD, BODY, HEAD, BODY, HEAD, BODY], 3),
    "an expert is unused": ([ALL, ALL - EXPERT, ALL], 3),
    "another one each time": ([ALL - EXPERT, ALL - {6, 7}], 2),
    "two heads on a trunk": ([BODY, BODY - {8, 9} | HEAD], 2),
    "overlapping only through a third": ([{0, 1}, {1, 2}, {2, 3}], 3),
    "not known": ([frozenset(), ALL], 2),
}


@pytest.mark.parametrize("name", CASES)
def test_micro_batches_by_what_the_backwards_reach(name):
    """The smallest number of backwards over the groups that have parameters in common."""
    backwards, expected = CASES[name]
    assert count_micro_batches(backwards) == expected


def _step(body, head, chunks, poison=None):
    hidden = body(torch.randn(8, 4))
    cut = hidden.detach().requires_grad_()
    for number, part in enumerate(cut.chunk(chunks), start=1):
        loss = head(part).square().mean() / chunks
        (loss * float("nan") if number == poison else loss).backward()
    hidden.backward(cut.grad)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_in_chunks_is_one_micro_batch(accumulate):
    """Eight backwards of the head and one of the body; with two of them declared, no step is refused."""
    torch.manual_seed(0)
    body, head = nn.Linear(4, 4), nn.Linear(4, 2)
    model = nn.ModuleList([body, head])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gradwatch.watch(model, optimizer, accumulate=accumulate) as watcher:
        for _ in range(3):
            for _ in range(accumulate):
                _step(body, head, chunks=8)
            optimizer.step()
            optimizer.zero_grad()
    steps = watcher.history.steps()
    assert steps["micro_batches"].tolist() == steps["weight"].tolist() == [accumulate] * 3
    assert not watcher.history.events()["kind"].eq("mistake").any()


def test_an_event_names_the_backward():
    """Where a micro-batch has several backwards, event and report say which one was bad."""
    torch.manual_seed(0)
    body, head = nn.Linear(4, 4), nn.Linear(4, 2)
    model = nn.ModuleList([body, head])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gradwatch.watch(model, optimizer) as watcher:
        for step in range(3):
            _step(body, head, chunks=4, poison=3 if step == 1 else None)
            optimizer.step()
            optimizer.zero_grad()
    event = watcher.history.events().query("kind == 'nan'").iloc[0]
    assert event["micro_batch"] == 3
    assert "in backward 3 of step 2" in event["message"]
    finding = watcher.report().findings[0]
    assert "backward 3" in finding.title

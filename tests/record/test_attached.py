"""A sink may have a method attached(watcher), and is told whose records it will receive."""

import pytest
import torch

import gradwatch
from gradwatch import GradwatchWarning
from gradwatch.testing import CapturingSink


class Knowing(CapturingSink):
    """Keeps the watcher, and reads its history when it is closed."""

    def __init__(self):
        super().__init__()
        self.watcher, self.calls, self.read = None, [], 0

    def attached(self, watcher):
        self.calls.append((watcher, len(self.batches)))
        self.watcher = watcher

    def close(self):
        self.read = len(self.watcher.history)
        super().close()


def train(steps=3):
    """A model that nobody has named to watch()."""
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.ones(4, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_sink_is_told_once_before_the_first_step():
    """It may read the whole history when it is closed; others are not bothered."""
    sink, other = Knowing(), CapturingSink()
    other.attached = "to the wall"
    model = torch.nn.Linear(2, 1)
    with gradwatch.watch(model, sinks=[sink, other]) as watcher:
        for _ in range(3):
            model(torch.ones(4, 2)).sum().backward()
    assert sink.calls == [(watcher, 0)]
    assert sink.read == 3
    assert len(other.steps) == 3


def test_one_that_fails_receives_the_records():
    """A warning names it, and the training goes on."""

    class Failing(CapturingSink):
        def attached(self, watcher):
            raise RuntimeError("not now")

    sink, model = Failing(), torch.nn.Linear(2, 1)
    watcher = gradwatch.watch(model, sinks=[sink])
    with pytest.warns(GradwatchWarning, match=r"Failing failed in attached\(\) with RuntimeError"):
        watcher.attach()
    model(torch.ones(4, 2)).sum().backward()
    watcher.close()
    assert len(sink.steps) == 1


def test_sinks_that_are_made_late_are_told():
    """Those of watch_all() know the watcher of their model, before the first records."""
    sinks = []

    def make(name):
        sinks.append(Knowing())
        return sinks[-1:]

    with gradwatch.watch_all(sinks=make):
        train()
    assert [[seen for _, seen in sink.calls] for sink in sinks] == [[0]]
    assert [(sink.read, len(sink.steps)) for sink in sinks] == [(3, 3)]

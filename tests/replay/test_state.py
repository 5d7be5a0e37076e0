"""State of every kind that a forward may have: put back, or the forward is not replayed."""

import contextvars
import io
import itertools
import os
import queue
import sys
import threading
import types
from array import array
from collections import ChainMap, Counter
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.replay.reach import Reach
from gradwatch.replay.runs import run_calls, run_closure
from gradwatch.replay.stand_ins import ReplayError
from tests.replay.replayed import WAYS, Seen, disturbance, kept

CURRENT = contextvars.ContextVar("current", default=0)
VARIABLE = "GRADWATCH_TEST_STATE"


class Slots:
    """Has slots, one of them empty at first."""

    __slots__ = ("later", "number", "total")

    def __init__(self):
        self.number = 0
        self.total = torch.zeros(3)


class MoreSlots(Slots):
    """Has further ones, and a dict."""

    __slots__ = ("__dict__", "more")

    def __init__(self):
        super().__init__()
        self.more = []


@dataclass(slots=True, frozen=True)
class Frozen:
    """Cannot be written to, but what it holds can."""

    counts: Counter


class Stream:
    """An iterator of a class of the user's."""

    def __init__(self):
        self.number = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.number += 1
        return self.number


def slots(kind):
    """Writes to slots, one of which has no value at first."""

    def forward(held):
        held.number += 1
        held.total += 1
        held.later = held.number
        if kind is MoreSlots:
            held.more.append(1)
            held.other = held.number
        return float(held.total.sum())

    return kind, forward


def frozen():
    """Counts in what a frozen object holds."""

    def forward(held):
        held.counts["calls"] += 1
        return held.counts["calls"]

    return lambda: Frozen(Counter()), forward


def namespace():
    """Counts in a namespace."""

    def forward(held):
        held.calls += 1
        return held.calls

    return lambda: types.SimpleNamespace(calls=0), forward


def local():
    """Counts in a variable of the thread."""

    def make():
        held = threading.local()
        held.calls = 0
        return held

    return make, namespace()[1]


def stream(make):
    """Takes one item from an iterator in each forward."""
    return make, lambda held: float(np.sum(next(held)))


def text():
    """Writes to a text in memory."""

    def forward(held):
        held.write("x")
        return len(held.getvalue())

    return io.StringIO, forward


def binary():
    """Reads from bytes in memory."""
    return lambda: io.BytesIO(bytes(range(9))), lambda held: held.read(1)[0]


def buffers():
    """Writes to arrays that are not NumPy's."""

    def forward(held):
        held[0][0] += 1
        held[1].extend(b"x")
        return held[0][0] + len(held[1])

    return lambda: [array("d", [0.0]), bytearray(b"a")], forward


def frame():
    """Adds a row to a frame."""

    def forward(held):
        held.loc[len(held)] = 1.0
        return len(held)

    return lambda: pd.DataFrame({"a": [0.0]}), forward


def seeds():
    """Spawns seeds."""
    return (
        lambda: np.random.SeedSequence(3),
        lambda held: float(held.spawn(1)[0].generate_state(1)[0] % 7),
    )


def context():
    """Counts in a context variable."""

    def make():
        CURRENT.set(0)

    def forward(held):
        CURRENT.set(CURRENT.get() + 1)
        return CURRENT.get()

    return make, forward


def environment():
    """Counts in an environment variable, and adds one."""

    def make():
        os.environ[VARIABLE] = "0"
        os.environ.pop(VARIABLE + "_2", None)

    def forward(held):
        os.environ[VARIABLE] = str(int(os.environ[VARIABLE]) + 1)
        os.environ[VARIABLE + "_2"] = "x"
        return int(os.environ[VARIABLE])

    return make, forward


KINDS = {
    "slots": slots(Slots),
    "more slots": slots(MoreSlots),
    "frozen": frozen(),
    "namespace": namespace(),
    "thread local": local(),
    "list iterator": stream(lambda: iter([1.0, 2.0, 3.0, 4.0])),
    "tuple iterator": stream(lambda: iter((1.0, 2.0, 3.0, 4.0))),
    "range": stream(lambda: iter(range(9))),
    "dict iterator": stream(lambda: iter({1: 0, 2: 0, 3: 0, 4: 0})),
    "reversed": stream(lambda: reversed([1.0, 2.0, 3.0, 4.0])),
    "enumerate": stream(lambda: enumerate([1.0, 2.0, 3.0, 4.0])),
    "map": stream(lambda: map(float, range(9))),
    "filter": stream(lambda: filter(None, range(9))),
    "zip": stream(lambda: zip(range(9), map(float, iter([4, 5, 6, 7])), strict=False)),
    "strict zip": stream(lambda: zip(range(9), iter(range(9)), strict=True)),
    "of the user": stream(Stream),
    "text": text(),
    "binary": binary(),
    "buffers": buffers(),
    "frame": frame(),
    "seeds": seeds(),
    "context": context(),
    "environment": environment(),
}
if sys.version_info < (3, 14):
    KINDS |= {
        "count": stream(itertools.count),
        "cycle": stream(lambda: itertools.cycle([1.0, 2.0])),
        "cycle of an iterator": stream(lambda: itertools.cycle(iter([1.0, 2.0, 3.0, 4.0]))),
        "chain": stream(lambda: itertools.chain([1.0], iter([2.0, 3.0, 4.0]))),
        "chain of a list": stream(lambda: itertools.chain.from_iterable([[1.0], iter([2, 3, 4])])),
        "islice": stream(lambda: itertools.islice(itertools.count(), 2, 9)),
        "tee": stream(lambda: itertools.tee(range(9))[1]),
    }


class Holding(nn.Module):
    """Holds an object, in a way, and adds what a function makes of it."""

    def __init__(self, held, function):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.held = [held]
        self.function = function

    def forward(self, x):
        return self.layer(x) + self.function(self.held[0]) * 0.01


@pytest.fixture(autouse=True)
def _variables(monkeypatch):
    monkeypatch.setenv(VARIABLE, "0")
    monkeypatch.setenv(VARIABLE + "_2", "x")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_state_is_put_back(kind, way):
    """The training goes on as if nothing had been run again."""
    make, function = KINDS[kind]
    models = []

    def training():
        models.append(Holding(make(), function))
        return models[-1], lambda step: models[-1](torch.ones(2, 6) * step).square().mean()

    def extra():
        # What the next forward would get.
        with torch.no_grad():
            try:
                return models[-1](torch.ones(2, 6))
            except StopIteration:
                return "ended"

    assert disturbance(training, way, extra, compares_gradients=False) == []


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="itertools cannot be copied any more")
def test_iterators_that_take_from_each_other():
    """The copies take from each other as the iterators do; what they go through is the same."""
    items = [[1], [2], [3]]
    inner = iter(items)
    module = Holding(inner, None)
    module.pairs, module.pair_list = zip(inner, itertools.count(), strict=False), (inner,)
    reach = Reach([module])
    reach.replace({})
    assert next(module.held[0]) is items[0]
    assert next(module.pairs) == ([2], 0)
    assert next(module.pair_list[0]) is items[2]
    reach.restore()
    assert module.held[0] is inner
    assert next(module.pairs) == ([1], 0)


def test_a_file_that_is_read(tmp_path):
    """It is read on from where it was."""
    path = tmp_path / "numbers.txt"
    path.write_text("\n".join(map(str, range(20))), encoding="utf-8")
    with path.open(encoding="utf-8") as file:
        _run_again(Holding(file, lambda held: int(held.readline())))
        assert file.readline() == "1\n"


def _run_again(model):
    seen = Seen()
    with kept(model) as calls:
        model(torch.ones(2, 6)).sum().backward()
    notes = run_calls(model, calls)(seen)
    assert seen.calls
    return notes


def test_what_is_taken_anew_is_told():
    """The replay had other items than the training."""
    notes = _run_again(Taking(iter([1.0, 2.0])))
    (note,) = notes
    assert note == (
        "The forward takes items from self.batches (list_iterator), of which the replay has taken "
        "the next ones, and not those that the training had."
    )


class Taking(nn.Module):
    """Takes an item in each forward."""

    def __init__(self, batches):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.batches = batches

    def forward(self, x):
        return self.layer(x) + self.take()

    def take(self):
        """Return the next item."""
        if isinstance(self.batches, queue.Queue | queue.SimpleQueue):
            return self.batches.get()
        return next(self.batches)


def _lines(path):
    path.write_text("1\n2\n3\n", encoding="utf-8")
    return path.open(encoding="utf-8")


def _filled(made):
    for number in range(4):
        made.put(number)
    return made


def test_what_cannot_be_put_back_is_not_taken_from():
    """A generator, a loader, what is built on them, and queues: the forward is not run again."""
    loader = torch.utils.data.DataLoader(torch.arange(9.0))
    for made, kind in (
        ((float(i) for i in range(9)), "generator"),
        (iter(loader), "_SingleProcessDataLoaderIter"),
        (map(float, iter(loader)), "map"),
        (_filled(queue.Queue()), "Queue"),
        (_filled(queue.SimpleQueue()), "SimpleQueue"),
    ):
        model = Taking(made)
        with pytest.raises(ReplayError, match=rf"self\.batches \({kind}\), which cannot be put"):
            _run_again(model)
        assert float(model.take()) == 1.0, kind


def test_a_file_whose_lines_are_iterated_over(tmp_path):
    """Python cannot say where it is in such a file."""
    with _lines(tmp_path / "lines.txt") as file:
        model = Taking(file)
        model.take = lambda: float(next(file))
        with pytest.raises(ReplayError, match="file"):
            _run_again(model)
        assert next(file) == "2\n"


def test_a_hook_that_takes_items():
    """It is code that is run again as well."""
    numbers = (float(i) for i in range(9))
    model = nn.Linear(6, 3)
    model.register_forward_hook(lambda module, args, output: output + next(numbers))
    with pytest.raises(ReplayError, match=r"numbers \(generator\)"):
        _run_again(model)
    assert next(numbers) == 1.0


def test_with_explain_the_reason_is_told():
    """The step is skipped, and nothing is claimed."""
    model = Taking(float("nan") for _ in range(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer, on_nonfinite="explain") as watcher:
        (model(torch.ones(2, 6)) ** 2).sum().backward()
        optimizer.step()
    (found,) = watcher.explanations
    assert found.origin == "not_found"
    assert "self.batches (generator), which cannot be put back" in found.notes[0]
    assert "cannot be put back" in gradwatch.explain(model, torch.ones(2, 6)).notes[0]


BATCHES = (number for number in range(9))


class Harmless(nn.Module):
    """Logs, locks and holds what it does not take from; an attribute is named as a global is."""

    def __init__(self, file):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.log = file
        self.lock = threading.Lock()
        self.sent = queue.Queue()
        self.unused = (number for number in range(9))
        self.BATCHES = 3
        self.ended = (number for number in range(0))
        assert list(self.ended) == []

    def forward(self, x):
        with self.lock:
            self.log.write("x")
            self.sent.put(1)
            gradwatch.errors.logger.debug("%s", self.BATCHES)
        return self.layer(x) + sum(self.ended)


def test_what_does_no_harm_is_run_again(tmp_path):
    """Files that are written to, locks, loggers, and iterators that no code of it names."""
    with (tmp_path / "log.txt").open("w", encoding="utf-8") as file:
        assert _run_again(Harmless(file)) == []


def test_objects_of_packages_that_hold_data(monkeypatch):
    """A cache of a library's is put back; what leads to a model or a thread is left alone."""
    package = types.ModuleType("some_package")
    package.__file__ = "/site-packages/some_package/__init__.py"
    monkeypatch.setitem(sys.modules, "some_package", package)
    source = {"__module__": "some_package"}
    layer, cache, machine = (type(name, (), source) for name in ("Layer", "Cache", "Machine"))
    model = Holding(cache(), None)
    held = model.held[0]
    held.layers, held.seen, held.dtype, held.names = [layer()], 0, torch.float32, {"a": {1}}
    held.layers[0].keys = torch.zeros(2)
    model.machine = machine()
    model.machine.steps, model.machine.model = [0], model

    def forward(found):
        found.seen += 1
        found.layers[0].keys.add_(1)
        found.layers[0].keys = torch.cat([found.layers[0].keys, torch.ones(1)])
        found.layers.append(layer())
        found.names["a"].add(found.seen)
        return float(found.layers[0].keys.sum())

    model.function = forward
    run_closure(model, lambda: model(torch.ones(2, 6)).sum())(Seen())
    assert held.seen == 0
    assert len(held.layers) == 1
    assert held.layers[0].keys.tolist() == [0.0, 0.0]
    assert held.names == {"a": {1}}
    assert Reach([model]).tensors.keys() >= {id(held.layers[0].keys)}


def test_a_mapping_of_the_standard_library_stays():
    """It is not looked into, but the dicts that a forward names are."""
    inner = {"calls": 0}
    model = Holding(ChainMap(inner), None)

    def forward(held):
        inner["calls"] += 1
        return held["calls"]

    model.function = forward
    _run_again(model)
    assert inner == {"calls": 1}

"""What a watcher keeps alive, and what keeps a watcher alive."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.testing import CapturingSink
from tests.support.memory import no_collector


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def _sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.01)


@pytest.fixture(scope="module", autouse=True)
def _imported():
    """What the first optimizer of a process imports leaves references to frames behind."""
    model = _net()
    _train(model, _sgd(model))


def _train(model, optimizer=None, steps=3):
    for _ in range(steps):
        model(torch.randn(6, 3)).square().mean().backward()
        if optimizer is None:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(parameter.grad, alpha=0.01)
            model.zero_grad()
        else:
            optimizer.step()
            optimizer.zero_grad()


def _everything(model, *others):
    parts = [*model.modules(), *model.parameters(), *model.buffers(), *others]
    return list(map(weakref.ref, parts))


def _left(references):
    return [type(one).__name__ for reference in references if (one := reference()) is not None]


_OPTIONS = {
    "watched": {},
    "skips": {"on_nonfinite": "skip"},
    "explained": {"on_nonfinite": "explain"},
    "clipped": {"clip": "auto"},
    "with statistics": {"statistics": ("norm", "update_ratio")},
}


@pytest.mark.parametrize("options", _OPTIONS.values(), ids=_OPTIONS)
@pytest.mark.parametrize("named", [True, False], ids=["named", "found"])
def test_what_nobody_closes_is_collected(named, options):
    """Model, optimizer and an attached watcher go together, and the records are delivered."""
    sink = CapturingSink()
    model = _net()
    optimizer = _sgd(model)
    watcher = gradwatch.watch(model, optimizer if named else None, sinks=[sink], **options)
    watcher.attach()
    _train(model, optimizer)
    references = _everything(model, optimizer, watcher)
    del model, optimizer, watcher
    gc.collect()
    assert _left(references) == []
    assert [record.step for batch in sink.batches for record in batch.steps] == [1, 2, 3]


@pytest.mark.parametrize("options", _OPTIONS.values(), ids=_OPTIONS)
@pytest.mark.parametrize("named", [True, False], ids=["named", "found"])
def test_what_was_closed_goes_at_once(named, options):
    """After the block the history is there, and model and optimizer go without the collector."""
    with no_collector():
        model = _net()
        optimizer = _sgd(model)
        with gradwatch.watch(model, optimizer if named else None, **options) as watcher:
            _train(model, optimizer)
            model(torch.randn(6, 3)).sum().backward()
        references = _everything(model, optimizer)
        del model, optimizer
        assert _left(references) == []
    assert len(watcher.history.steps()) == 3
    assert "Sequential of 6 parameters, SGD at step 3, closed" in repr(watcher)
    assert watcher.state_dict()["steps"] == {"SGD": 3}
    assert "3 steps" in str(watcher.report())


def test_a_closed_watcher_still_explains():
    """A loss is explained after the block as well, as long as its model is there."""
    parts = [nn.Linear(3, 4), nn.Linear(4, 2)]
    with gradwatch.watch(nn.ModuleList(parts)) as watcher:
        pass
    x = torch.zeros(2, 3)
    found = watcher.explain(lambda: (parts[1](parts[0](x)).log()).sum())
    assert (found.origin, found.operation) == ("operation", "log")
    weight = weakref.ref(parts[0].weight)
    parts.clear()
    gc.collect()
    assert weight() is None


@pytest.mark.parametrize("loop", ["optimizer", "by hand"])
def test_a_watcher_that_nobody_holds(loop):
    """One that was attached in a statement watches for as long as the model lives."""
    sink = CapturingSink()
    model = _net()
    optimizer = None if loop == "by hand" else _sgd(model)
    gradwatch.watch(model, sinks=[sink]).attach()
    gc.collect()
    _train(model, optimizer)
    gc.collect()
    if optimizer is not None:
        optimizer = _sgd(model)
        gc.collect()
    _train(model, optimizer, steps=1)
    references = _everything(model)
    del model, optimizer
    gc.collect()
    assert _left(references) == []
    assert sum(len(batch.steps) for batch in sink.batches) == 4


def test_tensors_hold_their_watcher():
    """So does a mapping of tensors, without a module or an optimizer."""
    sink = CapturingSink()
    x = torch.ones(3, requires_grad=True)
    gradwatch.watch({"x": x}, sinks=[sink]).attach()
    gc.collect()
    for _ in range(3):
        x.grad = None
        x.square().sum().backward()
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None
    assert sum(len(batch.steps) for batch in sink.batches) == 3


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_scripted_model_holds_its_watcher():
    """Its modules have no hooks to hold it with, and hold it all the same."""
    sink = CapturingSink()
    model = torch.jit.script(_net())
    gradwatch.watch(model, sinks=[sink]).attach()
    gc.collect()
    optimizer = _sgd(model)
    _train(model, optimizer)
    references = list(map(weakref.ref, [*model.parameters(), optimizer]))
    del model, optimizer
    gc.collect()
    assert _left(references) == []
    assert sum(len(batch.steps) for batch in sink.batches) == 3


def test_modules_of_a_temporary_list_hold_their_watcher():
    """The list may have been made for watch() alone."""
    sink = CapturingSink()
    parts = nn.Linear(3, 4), nn.Linear(4, 2)
    gradwatch.watch(nn.ModuleList(parts), sinks=[sink]).attach()
    gc.collect()
    optimizer = torch.optim.SGD([*parts[0].parameters(), *parts[1].parameters()], lr=0.1)
    _train(nn.Sequential(*parts), optimizer)
    del parts, optimizer
    gc.collect()
    assert sum(len(batch.steps) for batch in sink.batches) == 3


def _saved(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


_COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": _saved,
}


@pytest.mark.parametrize("copied", _COPIES.values(), ids=_COPIES)
def test_a_copy_of_the_model_is_not_watched(copied):
    """A copy has no watcher, trains, loads weights and can be watched by itself."""
    model = _net()
    optimizer = _sgd(model)
    with gradwatch.watch(model, optimizer) as watcher:
        _train(model, optimizer, steps=1)
        other = copied(model)
        assert other.load_state_dict(model.state_dict()).missing_keys == []
        its = _sgd(other)
        with gradwatch.watch(other, its) as second:
            _train(other, its, steps=2)
        references = _everything(other, its)
        del other, its
        assert _left(references) == []
    assert (watcher.last.step, second.last.step) == (1, 2)
    assert not any(module._load_state_dict_post_hooks for module in model.modules())


def test_a_copy_of_a_watched_tensor_is_plain():
    """Saved, it is loaded without gradwatch and with weights_only."""
    x = torch.ones(3, requires_grad=True)
    with gradwatch.watch({"x": x}):
        stream = io.BytesIO()
        torch.save({"x": x}, stream)
        stream.seek(0)
        assert b"gradwatch." not in stream.getvalue()
        loaded = torch.load(stream, weights_only=True)["x"]
        copied = copy.deepcopy(x)
    assert torch.equal(loaded, x)
    assert torch.equal(copied, x)
    assert vars(x) == {}


def test_a_temporary_optimizer_is_kept():
    """A managed loop steps an optimizer that nobody else holds."""
    model = _net()
    before = model[0].weight.detach().clone()
    with gradwatch.watch(model, _sgd(model)) as watcher:
        gc.collect()
        watcher.backward(model(torch.randn(6, 3)).square().mean())
        assert watcher.step()
    assert not torch.equal(model[0].weight, before)


def test_an_optimizer_that_is_built_anew():
    """A loop that builds one for each epoch has one series of steps, not one for each epoch."""
    model = _net()
    with gradwatch.watch(model) as watcher:
        for _ in range(3):
            optimizer = _sgd(model)
            _train(model, optimizer, steps=2)
            del optimizer
    assert list(watcher.history.steps().index) == [1, 2, 3, 4, 5, 6]
    assert set(watcher.history.steps()["optimizer"]) == {"SGD"}
    assert watcher.events == []


def test_optimizers_that_are_there_together_are_two():
    """One that is built while the other lives has a label of its own."""
    model = _net()
    first, second = _sgd(model), _sgd(model)
    with gradwatch.watch(model) as watcher:
        _train(model, first, steps=1)
        _train(model, second, steps=1)
    assert watcher.history.steps()["optimizer"].tolist() == ["SGD", "SGD-1"]


def test_a_loop_does_not_keep_its_first_model():
    """The search for a scaler in the loop's variables leaves no reference to them behind."""
    with no_collector():
        for _ in range(2):
            model = _net()
            optimizer = _sgd(model)
            with gradwatch.watch(model, optimizer):
                _train(model, optimizer, steps=1)
            references = _everything(model, optimizer)
            del model, optimizer
            assert _left(references) == []

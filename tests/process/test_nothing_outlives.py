"""A watcher that holds nothing: what the program drops is gone at once, without the collector."""

import gc
import weakref
from contextlib import suppress

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradwatch.adapters import check_options
from gradwatch.watcher import build_watcher
from tests.support.memory import no_collector


@pytest.fixture(scope="module", autouse=True)
def _imported():
    """What the first optimizer of a process imports leaves references to frames behind."""
    model = _net()
    _train(model, _adam(model), steps=1)


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def _adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.01)


def _watched(model, *optimizers, **given):
    given = {"on_nonfinite": "record", **given}
    options = check_options("watch_all", given, accumulate=1, scaler=None)
    return build_watcher(model, list(optimizers), options, weakref.ref(model)).attach()


def _backward(model, scale=1.0):
    model(torch.randn(6, 3) * scale).square().mean().backward()


def _train(model, *optimizers, steps=3, accumulate=1, **backward):
    for _ in range(steps):
        for _ in range(accumulate):
            _backward(model, **backward)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def _everything(model, *optimizers):
    """Weak references to a model, its parts, its parameters and buffers, and to optimizers."""
    parts = [*model.modules(), *model.parameters(), *model.buffers(), *optimizers]
    return list(map(weakref.ref, parts))


def _left(references):
    return [type(one).__name__ for reference in references if (one := reference()) is not None]


def _steps(watcher):
    return [[row.optimizer, row.Index] for row in watcher.history.steps().itertuples()]


_OPTIONS = {
    "watched": {},
    "skips": {"on_nonfinite": "skip"},
    "explained": {"on_nonfinite": "explain"},
    "clipped": {"clip": 1e-3},
    "clipped by groups": {"clip": "auto"},
    "with statistics": {"statistics": ("norm", "max", "update_ratio")},
}


@pytest.mark.parametrize("options", _OPTIONS.values(), ids=_OPTIONS)
@pytest.mark.parametrize("ends", ["after a step", "after a backward", "accumulating"])
def test_model_and_optimizer_go_at_once(options, ends):
    """Nothing is left of a training whose model and optimizer the program drops."""
    with no_collector():
        model = _net()
        optimizer = _adam(model)
        watcher = _watched(model, optimizer, **options)
        _train(model, optimizer, accumulate=2 if ends == "accumulating" else 1)
        if ends != "after a step":
            _backward(model)
        references = _everything(model, optimizer)
        assert not watcher.is_over
        del model, optimizer
        assert _left(references) == []
        assert watcher.is_over
    assert [step for _, step in _steps(watcher)] == [1, 2, 3]
    before = watcher.history.parameters()
    watcher.close()
    assert watcher.history.parameters().equals(before)
    assert watcher.last.step == 3
    assert "3 steps, 6 parameters" in str(watcher.report())


@pytest.mark.parametrize("options", _OPTIONS.values(), ids=_OPTIONS)
def test_a_bad_step_keeps_nothing(options):
    """Gradients that were NaN, skipped or explained, are forgotten with their model."""
    with no_collector():
        model = _net()
        optimizer = _adam(model)
        watcher = _watched(model, optimizer, **options)
        _train(model, optimizer)
        _train(model, optimizer, steps=1, scale=float("nan"))
        references = _everything(model, optimizer)
        del model, optimizer
        assert _left(references) == []
    watcher.close()
    assert any(event.kind == "nan" for event in watcher.events)


def test_gradients_go_with_their_parameters():
    """The gradient of a backward without a step is not kept either."""
    with no_collector():
        model = _net()
        optimizer = _adam(model)
        watcher = _watched(model, optimizer)
        _backward(model)
        gradients = [weakref.ref(parameter.grad) for parameter in model.parameters()]
        del model, optimizer
        assert _left(gradients) == []
    watcher.close()
    assert [event.kind for event in watcher.events] == ["discarded"]


def test_an_optimizer_goes_while_its_model_lives():
    """A loop that builds an optimizer in each epoch has one at a time, under one label."""
    with no_collector():
        model = _net()
        optimizer = _adam(model)
        watcher = _watched(model, optimizer)
        for _ in range(3):
            _train(model, optimizer, steps=2)
            state = [weakref.ref(value["exp_avg"]) for value in optimizer.state.values()]
            gone = weakref.ref(optimizer)
            del optimizer
            assert gone() is None
            assert _left(state) == []
            optimizer = _adam(model)
            watcher.follow(optimizer)
        assert not watcher.is_over
        references = _everything(model, optimizer)
        del model, optimizer
        assert _left(references) == []
    assert _steps(watcher) == [["Adam", step] for step in range(1, 7)]
    watcher.close()


def test_an_optimizer_that_nobody_announced_goes_on_as_well():
    """The successor of an optimizer is found at its first step, with the gradients before it."""
    model = _net()
    optimizer = _adam(model)
    watcher = _watched(model, optimizer)
    _train(model, optimizer, steps=1)
    del optimizer
    optimizer = _adam(model)
    _train(model, optimizer, steps=2)
    assert _steps(watcher) == [["Adam", 1], ["Adam", 2], ["Adam", 3]]
    assert watcher.history.steps()["micro_batches"].tolist() == [1, 1, 1]
    assert watcher.history.steps()["grad_norm"].gt(0).all()
    watcher.close()


def test_one_of_another_class_has_its_own_label():
    """An optimizer of another class takes over the parameters, and counts its own steps."""
    model = _net()
    optimizer = _adam(model)
    watcher = _watched(model, optimizer)
    _train(model, optimizer, steps=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watcher.follow(optimizer)
    _train(model, optimizer, steps=2)
    assert _steps(watcher) == [["Adam", 1], ["Adam", 2], ["SGD", 1], ["SGD", 2]]
    watcher.close()
    assert watcher.events == []


def test_one_of_other_parameters_has_its_own_label():
    """An optimizer of the same class with other parameters than the one that is gone is another."""
    model = _net()
    optimizer = _adam(model[:2])
    watcher = _watched(model, optimizer)
    _train(model, optimizer, steps=2)
    optimizer = _adam(model[1:])
    watcher.follow(optimizer)
    model.zero_grad()
    _train(model, optimizer, steps=1)
    assert _steps(watcher) == [["Adam", 1], ["Adam", 2], ["Adam-1", 1]]
    watcher.close()


def test_layers_that_are_thawed_later():
    """An optimizer that is built anew with more parameters goes on under the same label."""
    model = _net()
    model[0].requires_grad_(False)
    optimizer = _adam(model[1:])
    watcher = _watched(model, optimizer)
    _train(model, optimizer, steps=2)
    model[0].requires_grad_(True)
    optimizer = _adam(model)
    watcher.follow(optimizer)
    _train(model, optimizer, steps=1)
    assert _steps(watcher) == [["Adam", 1], ["Adam", 2], ["Adam", 3]]
    assert watcher.history.parameters().query("step == 3")["parameter"].nunique() == 6
    watcher.close()
    assert watcher.events == []


@pytest.mark.parametrize("options", _OPTIONS.values(), ids=_OPTIONS)
def test_a_model_goes_while_its_optimizer_lives(options):
    """Module and buffers go; steps of the parameters are recorded under their names."""
    with no_collector():
        model = _net()
        optimizer = _adam(model)
        watcher = _watched(model, optimizer, **options)
        _train(model, optimizer, steps=2)
        first = model[0].weight
        parts = list(map(weakref.ref, [*model.modules(), *model.buffers()]))
        del model
        assert _left(parts) == []
        assert not watcher.is_over
        first.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        references = [weakref.ref(first), weakref.ref(optimizer)]
        del first, optimizer
        assert _left(references) == []
        assert watcher.is_over
    watcher.close()
    assert watcher.last.step == 3
    named = watcher.history.parameters().query("step == 3 and grad_norm > 0")
    assert named["parameter"].tolist() == ["0.weight"]


def test_a_part_that_lives_on():
    """A module of the model that the program keeps is kept by the program alone."""
    with no_collector():
        model = _net()
        optimizer = _adam(model)
        watcher = _watched(model, optimizer)
        _train(model, optimizer)
        first = model[0]
        del model, optimizer
        assert watcher.is_over
        gone = weakref.ref(first.weight)
        del first
        assert gone() is None
    watcher.close()


def test_several_optimizers_go():
    """Each goes when it is dropped, and all that is left when the last one is."""
    with no_collector():
        model = _net()
        one, other = _adam(model[:2]), torch.optim.SGD(model[2:].parameters(), lr=0.1)
        watcher = _watched(model, one, other)
        _train(model, one, other)
        gone = weakref.ref(other)
        del other
        assert gone() is None
        references = _everything(model, one)
        del model, one
        assert _left(references) == []
        assert watcher.is_over
    watcher.close()


def test_an_output_does_not_keep_the_model():
    """A loss that the program keeps holds the parameters that it was computed from, no module."""
    with no_collector():
        model = _net()
        optimizer = _adam(model)
        watcher = _watched(model, optimizer, on_nonfinite="explain")
        loss = model(torch.randn(6, 3)).square().mean()
        loss.backward(retain_graph=True)
        parts = list(map(weakref.ref, [*model.modules(), optimizer]))
        del model, optimizer
        assert _left(parts) == []
        del loss
    watcher.close()


def test_a_step_that_raised_keeps_nothing():
    """An optimizer whose step has raised goes like any other, with its closure."""

    class Odd(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {"lr": 0.1})

        def step(self, closure):
            closure()
            raise RuntimeError("odd")

    with no_collector():
        model = _net()
        optimizer = Odd(model.parameters())
        watcher = _watched(model, optimizer, on_nonfinite="explain")

        def closure(model=model):
            loss = model(torch.randn(6, 3)).square().mean()
            loss.backward()
            return loss

        with suppress(RuntimeError):
            optimizer.step(closure)
        references = _everything(model, optimizer)
        del model, optimizer, closure
        assert _left(references) == []
    watcher.close()


def test_a_scaled_step_that_was_left_out():
    """A step that a scaler has left out last is recorded at the end, without the model."""
    with no_collector():
        model = _net()
        optimizer = _adam(model)
        scaler = torch.amp.GradScaler("cpu")
        watcher = _watched(model, optimizer)
        for factor in (1.0, float("inf")):
            loss = model(torch.randn(6, 3)).square().mean() * factor
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        references = _everything(model, optimizer)
        del model, optimizer, loss
        assert _left(references) == []
        assert watcher.is_over
    watcher.close()
    assert watcher.history.steps()["outcome"].tolist() == ["applied", "skipped_scaler"]


def _left_of_replica(watched, **wrapper):
    """Returns what is left of a training under DDP before and after a look of the collector."""
    with no_collector():
        inner = _net()
        model = DistributedDataParallel(inner, **wrapper)
        optimizer = _adam(model)
        watcher = _watched(model, optimizer) if watched else None
        _train(model, optimizer)
        _backward(model)
        references = _everything(model, optimizer)
        del model, inner, optimizer
        left = _left(references)
    gc.collect()
    if watcher is not None:
        assert watcher.is_over
        watcher.close()
        assert watcher.last.step == 3
    return left, _left(references)


@pytest.mark.parametrize("wrapper", [{}, {"gradient_as_bucket_view": True}], ids=str)
def test_a_replica_goes_as_it_would(wrapper):
    """What DistributedDataParallel itself keeps is kept, and nothing else."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert _left_of_replica(True, **wrapper) == _left_of_replica(False, **wrapper)
    finally:
        dist.destroy_process_group()

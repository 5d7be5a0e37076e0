"""A model whose parameters are replaced after watch(), as a move to some devices does."""

import contextlib

import pytest
import torch
from torch import nn

import gradwatch
from tests.support import zoo

STEPS = 4
LIMIT = 0.2


@contextlib.contextmanager
def _conversion(set_to):
    set_to(True)
    try:
        yield
    finally:
        set_to(False)


def _overwrite(model):
    """Moves a model as to XLA: each parameter is another tensor afterwards."""
    with _conversion(torch.__future__.set_overwrite_module_params_on_conversion):
        model.double().float()


def _swap(model):
    """Moves a model by ``torch.utils.swap_tensors()``: the same tensors, without their hooks."""
    with _conversion(torch.__future__.set_swap_module_params_on_conversion):
        model.double().float()


def _by_hand(model):
    """Replaces each parameter."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().clone()))


MOVES = [_overwrite, _swap, _by_hand]
REPLACING = [_overwrite, _by_hand]


def _sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05)


def _train(model, optimizer, steps=range(STEPS)):
    for step in steps:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def _weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def _expected():
    """What a watcher records of a model that nobody has moved, and its weights at the end."""
    model = zoo.small()
    optimizer = _sgd(model)
    with gradwatch.watch(model, optimizer, clip=LIMIT) as watcher:
        _train(model, optimizer)
    return watcher, _weights(model)


def _assert_as_expected(watcher, model, seen=STEPS):
    """Norms and weights are those of a model in one place; ``seen`` steps had their backward."""
    expected, weights = _expected()
    columns = ["grad_norm", "grad_norm_clipped", "clip_coef", "outcome"]
    steps = watcher.history.steps()
    assert steps[columns].equals(expected.history.steps()[columns])
    assert (steps.grad_norm_clipped <= LIMIT * 1.001).all()
    assert watcher.history.parameters().equals(expected.history.parameters())
    assert steps.micro_batches.tolist().count(1) == seen
    torch.testing.assert_close(_weights(model), weights, rtol=0, atol=0)


@pytest.mark.parametrize("entered", [False, True], ids=["before attach", "after attach"])
@pytest.mark.parametrize("move", MOVES)
def test_an_optimizer_that_is_built_after_the_move(move, entered):
    """Every step is recorded and clipped as if the model had not been moved, and nothing is told."""
    model = zoo.small()
    watcher = gradwatch.watch(model, clip=LIMIT)
    if not entered:
        move(model)
    with watcher:
        if entered:
            move(model)
        _train(model, _sgd(model))
    _assert_as_expected(watcher, model)
    assert watcher.events == []


@pytest.mark.parametrize("move", REPLACING)
def test_another_optimizer_than_the_named_one(move):
    """The one that is built after the move is followed."""
    model = zoo.small()
    with gradwatch.watch(model, _sgd(model), clip=LIMIT) as watcher:
        move(model)
        _train(model, _sgd(model))
    _assert_as_expected(watcher, model)


@pytest.mark.parametrize("move", REPLACING)
def test_an_optimizer_that_holds_the_old_parameters(move):
    """It trains nothing, which is told by name, once."""
    model = zoo.small()
    optimizer = _sgd(model)
    before = _weights(model)
    with gradwatch.watch(model, optimizer, clip=LIMIT) as watcher:
        move(model)
        _train(model, optimizer)
    torch.testing.assert_close(_weights(model), before, rtol=0, atol=0)
    (event,) = watcher.events
    assert (event.kind, event.step, event.parameter) == ("mistake", 1, "0.weight")
    assert event.message.startswith("SGD steps the old 4 parameters (0.weight, 0.bias, ")
    assert "build the optimizer then" in event.message
    assert watcher.history.steps().grad_norm.tolist() == [0.0] * STEPS


def test_an_optimizer_that_is_told_of_the_move():
    """Where the loop puts the new parameters into the groups, all goes on."""
    model = zoo.small()
    optimizer = _sgd(model)
    with gradwatch.watch(model, optimizer, clip=LIMIT) as watcher:
        _overwrite(model)
        optimizer.param_groups[0]["params"] = list(model.parameters())
        _train(model, optimizer)
    _assert_as_expected(watcher, model)
    assert watcher.events == []


def test_a_swap_leaves_the_optimizer_as_it_is():
    """The tensors are the same ones, so the named optimizer goes on."""
    model = zoo.small()
    optimizer = _sgd(model)
    with gradwatch.watch(model, optimizer, clip=LIMIT) as watcher:
        _swap(model)
        _train(model, optimizer)
    _assert_as_expected(watcher, model)
    assert watcher.events == []


@pytest.mark.parametrize("move", MOVES)
def test_in_the_middle_of_a_training(move):
    """The norms are right from the first step on, and what was not seen of it is told."""
    model = zoo.small()
    optimizer = _sgd(model)
    with gradwatch.watch(model, clip=LIMIT) as watcher:
        _train(model, optimizer, range(2))
        move(model)
        optimizer = _sgd(model)
        _train(model, optimizer, range(2, STEPS))
    _assert_as_expected(watcher, model, seen=STEPS - 1)
    (event,) = watcher.events
    assert (event.kind, event.step) == ("changed", 3)
    assert event.message.startswith("The parameters of the watched model were replaced before step")


def test_a_managed_loop_sees_the_move_in_time():
    """Its backward looks first, so that no micro-batch is missed."""
    model = zoo.small()
    optimizer = _sgd(model)
    with gradwatch.watch(model, optimizer, accumulate=2) as watcher:
        for step in range(8):
            if step == 4:
                _swap(model)
            watcher.backward(model(torch.ones(3, 4)).square().mean())
            watcher.step()
    assert watcher.history.steps().micro_batches.tolist() == [2, 2, 2, 2]
    assert watcher.events == []


@pytest.mark.parametrize("columns", [1, 3])
def test_a_layer_that_is_replaced_before_the_first_backward(columns):
    """It is followed under its name, in a new shape, too."""
    model = zoo.small()
    with gradwatch.watch(model, clip=LIMIT) as watcher:
        with torch.random.fork_rng(devices=[]):
            model[-1] = nn.Linear(model[-1].in_features, columns)
        _train(model, _sgd(model))
    norms = watcher.history.parameters()
    assert (norms[norms.parameter == "2.weight"].grad_norm > 0).all()
    assert watcher.history.layout.shapes[-1] == (columns,)
    assert watcher.events == []


def test_a_layer_that_is_replaced_later():
    """It is followed as soon as an optimizer steps it."""
    model = zoo.small()
    optimizer = _sgd(model)
    with gradwatch.watch(model, clip=LIMIT) as watcher:
        _train(model, optimizer, range(2))
        model[-1] = nn.Linear(model[-1].in_features, 1)
        optimizer = _sgd(model)
        _train(model, optimizer, range(2, STEPS))
        total = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert watcher.last.grad_norm_clipped == pytest.approx(float(total), rel=1e-5)
    assert watcher.history.steps().micro_batches.tolist() == [1] * STEPS
    assert watcher.events == []


def test_a_layer_that_the_optimizer_does_not_have():
    """The new layer is not trained, and is told by name."""
    model = zoo.small()
    optimizer = _sgd(model)
    with gradwatch.watch(model, optimizer) as watcher:
        model[-1] = nn.Linear(model[-1].in_features, 1)
        _train(model, optimizer)
    (event,) = watcher.events
    assert event.message.startswith("SGD steps the old 2 parameters (2.weight, 2.bias)")


def test_a_model_on_the_meta_device():
    """It is watched as soon as it has memory."""
    with torch.device("meta"):
        model = zoo.small()
    with gradwatch.watch(model, clip=LIMIT) as watcher:
        model.to_empty(device="cpu")
        model.load_state_dict(zoo.small().state_dict())
        _train(model, _sgd(model))
    _assert_as_expected(watcher, model)


def test_hooks_of_others_that_a_swap_has_cut_off():
    """Theirs stay as dead as torch has left them, and gradwatch says that it sees nothing."""
    model = zoo.small()
    calls = []
    model[0].weight.register_post_accumulate_grad_hook(calls.append)
    with gradwatch.watch(model) as watcher:
        _swap(model)
        _train(model, _sgd(model))
    assert calls == []
    assert watcher.events[0].message.startswith("1 parameter (0.weight) cannot be watched any more")


def test_parameters_that_are_there_for_one_call():
    """What functional_call() puts into a model is not taken for the model's own."""
    model = zoo.small()
    optimizer = _sgd(model)
    others = {name: one.detach().clone() for name, one in model.named_parameters()}
    with gradwatch.watch(model, optimizer, clip=LIMIT) as watcher:
        torch.func.functional_call(model, others, (torch.ones(2, 4),))
        _train(model, optimizer)
    _assert_as_expected(watcher, model)
    assert watcher.events == []


def test_nothing_is_left_on_the_model():
    """The hook that looks before the first backward is gone after it, or at the end."""
    for trains in (True, False):
        model = zoo.small()
        with gradwatch.watch(model, _sgd(model)):
            assert len(model._forward_pre_hooks) == 1
            if trains:
                _train(model, _sgd(model), range(2))
                assert not model._forward_pre_hooks
        assert not model._forward_pre_hooks

"""Programs of many kinds: under watch_all() whatever they drop is gone at once, as without it."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradwatch


def _net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def _data():
    return torch.randn(6, 3)


def _adam(*modules):
    return torch.optim.Adam([one for module in modules for one in module.parameters()])


def _references(*objects):
    found = []
    for one in objects:
        found.append(weakref.ref(one))
        if isinstance(one, nn.Module):
            parts = (*one.children(), *one.parameters(), *one.buffers())
            found += map(weakref.ref, parts)
    return found


def _left(references):
    return [type(one).__name__ for reference in references if (one := reference()) is not None]


def _step(model, *optimizers):
    model(_data()).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def _with_a_scheduler():
    model = _net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for _ in range(3):
        _step(model, optimizer)
        scheduler.step()
    references = _references(model, optimizer, scheduler)
    del model, optimizer, scheduler
    return _left(references)


def _generator_and_discriminator():
    generator, critic = nn.Linear(3, 3), nn.Linear(3, 1)
    ours, theirs = _adam(generator), _adam(critic)
    for _ in range(3):
        theirs.zero_grad()
        (critic(generator(_data()).detach()).mean() - critic(_data()).mean()).backward()
        theirs.step()
        ours.zero_grad()
        critic(generator(_data())).mean().neg().backward()
        ours.step()
    references = _references(generator, critic, ours, theirs)
    del generator, critic, ours, theirs
    return _left(references)


def _a_parameter_of_no_module():
    model, factor = _net(), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([*model.parameters(), factor])
    for _ in range(3):
        (model(_data()) * factor).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    references = _references(model, factor, optimizer)
    del model, factor, optimizer
    return _left(references)


def _no_module():
    tensor = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.SGD([tensor], lr=0.1)
    for _ in range(3):
        tensor.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    references = _references(tensor, optimizer)
    del tensor, optimizer
    return _left(references)


def _two_models_of_one_optimizer():
    encoder, head = _net(), nn.Linear(2, 1)
    optimizer = _adam(encoder, head)
    for _ in range(3):
        head(encoder(_data())).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    references = _references(encoder, head, optimizer)
    del encoder, head, optimizer
    return _left(references)


def _with_a_scaler():
    model = _net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(3):
        scaler.scale(model(_data()).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    references = _references(model, optimizer)
    del model, optimizer
    return _left(references)


def _copies():
    model = _net()
    optimizer = _adam(model)
    _step(model, optimizer)
    both = copy.deepcopy((model, optimizer))
    _step(*both)
    references = _references(model, optimizer, *both)
    del model, optimizer, both
    return _left(references)


def _closures():
    model, inputs = _net(), _data()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure(model=model, optimizer=optimizer):
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    references = _references(model, optimizer)
    del model, optimizer, closure
    return _left(references)


def _checkpointing():
    model = _net()
    optimizer = _adam(model)
    for _ in range(3):
        checkpoint(model, _data(), use_reentrant=False).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    references = _references(model, optimizer)
    del model, optimizer
    return _left(references)


def _an_optimizer_for_each_epoch():
    model, left = _net(), []
    for _ in range(3):
        optimizer = _adam(model)
        _step(model, optimizer)
        references = _references(optimizer)
        del optimizer
        left += _left(references)
    references = _references(model)
    del model
    return left + _left(references)


def _a_model_for_each_fold():
    left, before = [], []
    for _ in range(3):
        model = _net()
        optimizer = _adam(model)
        left += _left(before)  # by now the variables hold the next ones
        _step(model, optimizer)
        before = _references(model, optimizer)
    return left


def _a_last_backward():
    model = _net()
    optimizer = _adam(model)
    _step(model, optimizer)
    _step(model)
    references = _references(model, optimizer)
    del model, optimizer
    return _left(references)


_PROGRAMS = [
    _with_a_scheduler,
    _generator_and_discriminator,
    _a_parameter_of_no_module,
    _no_module,
    _two_models_of_one_optimizer,
    _with_a_scaler,
    _copies,
    _closures,
    _checkpointing,
    _an_optimizer_for_each_epoch,
    _a_model_for_each_fold,
    _a_last_backward,
]


@pytest.mark.parametrize("explains", [False, True], ids=["watched", "explained"])
@pytest.mark.parametrize("program", _PROGRAMS)
def test_what_a_program_drops_is_gone(program, explains):
    """Models, parameters, buffers and optimizers go by their count of references."""
    program()  # what is imported for the first time leaves references to frames behind
    gc.collect()
    gc.disable()
    try:
        with gradwatch.watch_all(explain=explains) as watching:
            assert program() == []
            stepped = list(watching.watchers)
            over = [watcher.is_over for watcher in stepped]
    finally:
        gc.enable()
    assert all(over)
    assert stepped

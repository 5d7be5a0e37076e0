"""No gradient is copied, none is kept; the work per step does not grow with the parameters."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import gradwatch
from tests.support import zoo
from tests.support.calls import CountCalls
from tests.support.options import OPTIONS


class _Fresh(torch.autograd.Function):
    """The identity on a weight; remembers where in memory the gradient lay that it handed over."""

    addresses: list[int] = []  # noqa: RUF012

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight * 1.0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        fresh = grad + 1.0
        _Fresh.addresses.append(fresh.data_ptr())
        return fresh


@pytest.mark.parametrize("options", ["not_watched", *OPTIONS])
@pytest.mark.filterwarnings("ignore:.*sink.*")
def test_gradients_are_stolen_not_copied(options: str) -> None:
    """AccumulateGrad takes the backward's own tensor as .grad, as it does without gradwatch."""
    weights = {f"w{i}": torch.randn(64, requires_grad=True) for i in range(3)}
    optimizer = torch.optim.SGD(list(weights.values()), lr=0.1)
    watcher = (
        None
        if options == "not_watched"
        else gradwatch.watch(weights, optimizer, **OPTIONS[options]())
    )
    with watcher or torch.enable_grad():
        for _ in range(3):
            _Fresh.addresses = []
            sum(_Fresh.apply(weight).pow(2).sum() for weight in weights.values()).backward()
            assert {w.grad.data_ptr() for w in weights.values()} == set(_Fresh.addresses)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("managed", [False, True], ids=["unmanaged", "managed"])
@pytest.mark.parametrize("options", ["not_watched", *OPTIONS])
@pytest.mark.filterwarnings("ignore:.*sink.*")
def test_no_gradient_lives_beyond_zero_grad(options: str, managed: bool) -> None:
    """After zero_grad the memory of every gradient is free at once, without the garbage collector."""
    case = zoo.mlp()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    watcher = (
        None
        if options == "not_watched"
        else gradwatch.watch(case.model, optimizer, **OPTIONS[options]())
    )
    gc.disable()
    try:
        with watcher or torch.enable_grad():
            for index in range(4):
                loss = case.loss(case.model, case.batch(index))
                if managed and watcher is not None:
                    watcher.backward(loss)
                else:
                    loss.backward()
                held = [StorageWeakRef(p.grad.untyped_storage()) for p in case.model.parameters()]
                assert not any(storage.expired() for storage in held)
                if managed and watcher is not None:
                    assert watcher.step()
                else:
                    optimizer.step()
                    optimizer.zero_grad()
                assert all(storage.expired() for storage in held)
    finally:
        gc.enable()


def test_a_gradient_dropped_before_the_step_is_free_at_once() -> None:
    """A backward whose gradients are thrown away unused leaves no gradient behind."""
    case = zoo.mlp()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    with gradwatch.watch(case.model, optimizer, clip=0.1):
        case.loss(case.model, case.batch(0)).backward()
        held = [StorageWeakRef(p.grad.untyped_storage()) for p in case.model.parameters()]
        optimizer.zero_grad()
        assert all(storage.expired() for storage in held)


def test_the_graph_is_free_after_the_step() -> None:
    """No record, event or `last` keeps the loss or its graph alive, in the managed loop either."""
    case = zoo.mlp()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    with gradwatch.watch(case.model, optimizer) as watcher:
        hidden = torch.randn(4, 4, requires_grad=True) * 2.0
        held = StorageWeakRef(hidden.untyped_storage())
        loss = case.loss(case.model, case.batch(0)) + hidden.pow(2).sum()
        del hidden
        watcher.backward(loss)
        watcher.step()
        del loss
        assert held.expired()


def test_a_backward_pays_no_second_copy_of_the_gradients() -> None:
    """Watching a step with large gradients allocates less than one gradient on top of the bare step."""
    peaks = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(4)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        data = torch.randn(2, 256)
        with gradwatch.watch(model, optimizer) if watched else torch.enable_grad():
            for _ in range(2):
                model(data).pow(2).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            ) as profiler:
                model(data).pow(2).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        sizes = [
            event.self_cpu_memory_usage
            for event in profiler.key_averages()
            if event.self_cpu_memory_usage > 0
        ]
        peaks.append(sum(sizes))
    assert peaks[1] - peaks[0] < 256 * 256 * 4


def _calls_per_step(parameters: int, options: dict[str, Any] | None) -> int:
    weights = {f"w{i}": torch.ones(3, requires_grad=True) for i in range(parameters)}
    optimizer = torch.optim.SGD(list(weights.values()), lr=0.1, fused=True)
    with (
        gradwatch.watch(weights, optimizer, **options)
        if options is not None
        else torch.enable_grad()
    ):
        for _ in range(3):
            with CountCalls() as counter:
                torch.cat(list(weights.values())).pow(2).sum().backward()
                optimizer.step()
            optimizer.zero_grad()
    return counter.calls.total()


@pytest.mark.parametrize(
    "options", [{}, {"clip": 0.01}, {"clip": 1e6}, {"on_nonfinite": "skip"}], ids=str
)
def test_the_number_of_aten_calls_does_not_grow_with_the_parameters(
    options: dict[str, Any],
) -> None:
    """A step adds at most 12 ATen calls, as many for 300 parameters as for 10."""
    added = [_calls_per_step(n, options) - _calls_per_step(n, None) for n in (10, 300)]
    assert added[0] == added[1]
    assert added[0] <= 12

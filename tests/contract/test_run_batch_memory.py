"""Running a batch again: nothing of the attempt that failed is left, and a real lack of memory is survived."""

import sys
import textwrap
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import processes
from tests.support.memory import LIMIT_MEMORY

from .running_out import Fault, batch_of, new_watcher, plain_closure

ALWAYS = 99


class _Kept(torch.autograd.Function):
    """The identity; remembers what it keeps for its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: list[Any]) -> Tensor:
        ctx.activation = x.clone()  # not by save_for_backward: that would be freed by the backward
        kept.append(weakref.ref(ctx.activation))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * 1.0, None


@pytest.mark.parametrize("example", [0, 7], ids=["first", "last"])
@pytest.mark.parametrize("place", ["forward", "backward"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("logged", [False, True], ids=["dropped", "logged"])
def test_nothing_of_a_failed_attempt_is_left(
    logged: bool, accumulate: int, place: str, example: int
) -> None:
    """When a micro-batch begins, no activation and no gradient of an earlier one is alive, though a logger keeps the error."""
    model, watcher = new_watcher(accumulate=accumulate)
    fault, kept, gradients, alive = Fault(2, place, example), [], [], []
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradients.append(weakref.ref(gradient)))
    model.first.register_forward_hook(lambda m, args, output: _Kept.apply(output, kept))
    plain, errors = plain_closure(model, fault), []
    if logged:
        fault.check = _logging(fault.check, errors)  # type: ignore[method-assign]

    def closure(part: dict[str, Tensor]) -> Tensor:
        held = {id(p.grad) for p in model.parameters() if p.grad is not None}
        there = [g() for g in gradients]
        alive.append([k() is not None for k in kept].count(True))
        alive.append(len([g for g in there if g is not None and id(g) not in held]))
        return plain(part)

    with watcher:
        for index in range(3):
            watcher.run_batch(closure, batch_of(index))
            watcher.step()
    assert fault.sizes[:4] == [1, 8, 4, 4] if example else [1, 8, 4, 2]
    assert len(kept) > 8
    assert set(alive) == {0}
    assert bool(errors) is logged


def _logging(check: Callable[..., None], errors: list[Exception]) -> Callable[..., None]:
    def checked(*args: Any) -> None:
        try:
            check(*args)
        except torch.OutOfMemoryError as error:
            errors.append(error)
            raise

    return checked


def test_the_error_itself_is_gone() -> None:
    """A rerun begins without the error: its context would hold what its handlers did."""
    errors: list[weakref.ref[BaseException]] = []

    class Mine(MemoryError):
        """Can be referred to weakly."""

    model, watcher = new_watcher()
    plain = plain_closure(model, Fault(ALWAYS))

    def closure(part: dict[str, Tensor]) -> Tensor:
        assert all(error() is None for error in errors)
        if len(part["x"]) > 2:
            error = Mine()
            errors.append(weakref.ref(error))
            raise error
        return plain(part)

    with watcher:
        watcher.run_batch(closure, batch_of(1))
    assert len(errors) == 2


REAL = """
    import sys
    import torch
    from torch import nn
    import gradwatch

    LIMITED, BATCH = sys.argv[1] == "limited", 1 << 12
    torch.manual_seed(0)
    layers = [layer for _ in range(8) for layer in (nn.Linear(64, 64), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Dropout(), nn.Linear(64, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches, counts = [torch.randn(BATCH * (1 + 7 * (k % 2)), 64) for k in range(4)], []

    with gradwatch.watch(model, optimizer, accumulate=2) as watcher:
        if not LIMITED:
            size = int(sys.argv[2])
            watcher.load_state_dict({**watcher.state_dict(), "micro_batch_size": size})
        for index, batch in enumerate(batches):
            loss = watcher.run_batch(lambda part: model(part).square().mean(), batch)
            if watcher.step():
                counts.append(watcher.last.micro_batches)
            if index == 0 and LIMITED:
                # An example takes 4 KiB of activations and 1.5 of gradients: 8,192 examples fit with
                # room to spare, and 16,384 by no means, whatever the allocator adds. At the border
                # a first micro-batch might fit and the second not, which rounds otherwise.
                limit_memory(64 << 20)
    events = [event.kind for event in watcher.events]
    print(watcher.micro_batch_size, len(events), set(events) <= {"out_of_memory"})
    print(counts, loss.item(), watcher.last.grad_norm)
    print([p.double().sum().item() for p in model.parameters()], torch.rand(1).item())
"""


def _in_a_process(*arguments: str) -> list[str]:
    environment = processes.environment(MALLOC_ARENA_MAX="1")
    done = processes.run(*arguments, code=LIMIT_MEMORY + textwrap.dedent(REAL), env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_training_survives_a_real_lack_of_memory() -> None:
    """With the allocator's own errors a limited run ends with the bits of one that was not."""
    (size, *_), *limited = (line.split(maxsplit=1) for line in _in_a_process("limited"))
    assert int(size) == 1 << 13
    told, *unlimited = (line.split(maxsplit=1) for line in _in_a_process("whole", size))
    assert told == [size, "0 True"]
    assert limited == unlimited

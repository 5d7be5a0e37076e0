"""Models that are claimed inside of a step, where torch is running its global hooks."""

from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import gradwatch
from tests.support import zoo


def test_a_global_hook_of_the_program() -> None:
    """A global step hook of the program is called as before, whoever is found inside of a step."""
    model, other = zoo.small(), zoo.small()
    calls: list[str] = []

    def note(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        calls.append(type(optimizer).__name__)

    with gradwatch.watch_all() as watching:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        handle = register_optimizer_step_pre_hook(note)
        try:

            def closure() -> torch.Tensor:
                optimizer.zero_grad()
                loss = model(torch.ones(2, 4)).square().sum()
                loss.backward()
                return loss

            optimizer.step(closure)
            second = torch.optim.Adam(other.parameters())
            for parameter in other.parameters():  # set by hand: no backward is noticed before
                parameter.grad = torch.ones_like(parameter)
            second.step()
            optimizer.step(closure)
        finally:
            handle.remove()
    assert calls == ["SGD", "Adam", "SGD"]
    assert [watcher.last.step for watcher in watching.watchers if watcher.last] == [2, 1]

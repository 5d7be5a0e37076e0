"""A short training that sinks look at, and what it must show."""

import math

import pytest
import torch

import gradwatch


@pytest.fixture
def train():
    """Trains a small model with sinks; the watcher, closed, and the weights."""

    def run(
        *sinks, steps=20, nan_at=(), before_step=lambda step: None, seed=0, state=None, **options
    ):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        options = {"clip": 0.2, "on_nonfinite": "skip", **options}
        watcher = gradwatch.watch(model, optimizer, sinks=list(sinks), **options)
        if state is not None:
            watcher.load_state_dict(state)
        with watcher:
            for step in range(1, steps + 1):
                before_step(step)
                loss = model(torch.randn(8, 4)).square().mean()
                (loss * (math.nan if step in nan_at else 1.0)).backward()
                optimizer.step()
                optimizer.zero_grad()
        return watcher, [parameter.detach().clone() for parameter in model.parameters()]

    return run

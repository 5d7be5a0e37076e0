"""Where finite gradients became too large for a norm in float32."""

import inspect

import pytest
import torch
from torch import nn

from gradwatch.replay.overflow import explain_overflow
from tests.replay.replayed import kept


class Layered(nn.Module):
    """A layer, something that makes its result large or its gradient, and another layer."""

    def __init__(self, middle):
        super().__init__()
        self.enter = nn.Linear(4, 8)
        self.middle = middle
        self.leave = nn.Linear(8, 1)

    def forward(self, x):
        return self.leave(self.middle(self.enter(x)))


class Divide(nn.Module):
    def forward(self, x):
        return x / 1e-25


class Exponential(nn.Module):
    def forward(self, x):
        x = torch.cat([x[:3], x[3:4] * 0 + 60.0, x[4:]])
        return torch.exp(x)


class Root(nn.Module):
    def forward(self, x):
        x = x - x.detach() + 1e-37
        return torch.sqrt(x)


class Masked(nn.Module):
    def forward(self, x):
        scores = x.masked_fill(torch.arange(8) > 5, torch.finfo(x.dtype).min)
        return scores.softmax(1) / 1e-25


def _explained(model, x, scale=1.0):
    with kept(model) as calls:
        (model(x).mean() * scale).backward()
    count = sum(p.grad.numel() for p in model.parameters())
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    assert torch.isinf(torch.cat([p.grad.flatten() for p in model.parameters()]).norm())
    return explain_overflow(model, calls, count)


@pytest.mark.parametrize(
    ("middle", "operation", "phase"),
    [(Divide, "div", "forward"), (Exponential, "exp", "forward"), (Masked, "div", "forward")],
)
def test_the_operation(middle, operation, phase):
    """The first operation that gives such large elements is named, with its line."""
    torch.manual_seed(0)
    found = _explained(Layered(middle()), torch.randn(6, 4))
    assert (found.kind, found.origin, found.phase) == ("overflow", "operation", phase)
    assert (found.operation, found.module) == (operation, "middle")
    lines, start = inspect.getsourcelines(middle.forward)
    assert found.line == start + len(lines) - 1
    assert found.source == lines[-1].strip()
    assert found.count > 0
    assert "first appear" in found.notes[0]
    if middle is Exponential:
        assert found.examples == (3,)


def test_a_backward():
    """Where only the gradient is too large, it is the backward of the operation."""
    torch.manual_seed(0)
    found = _explained(Layered(Root()), torch.randn(6, 4), 1e3)
    assert (found.origin, found.phase, found.operation) == ("operation", "backward", "sqrt")
    assert (found.module, found.source) == ("middle", "return torch.sqrt(x)")


def test_an_input():
    """An input that is too large itself is named, and its examples."""
    torch.manual_seed(0)
    x = torch.randn(6, 4)
    x[2] = 1e25
    found = _explained(Layered(nn.Identity()), x)
    assert (found.kind, found.origin, found.argument) == ("overflow", "input", "x")
    assert found.examples == (2,)


def test_the_output_gradient():
    """A loss that is too large is what came from outside of the module."""
    torch.manual_seed(0)
    found = _explained(Layered(nn.Identity()), torch.randn(6, 4), 1e25)
    assert (found.kind, found.origin) == ("overflow", "output_gradient")


def test_nothing_is_too_large():
    """Of ordinary gradients nothing is found."""
    torch.manual_seed(0)
    model = Layered(nn.Identity())
    with kept(model) as calls:
        model(torch.randn(6, 4)).mean().backward()
    assert explain_overflow(model, calls, 100).origin == "not_found"

"""check_gradients in the precision that a function allows: float64, float32, bfloat16 or float16."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradwatch import check_gradients


class RMSNorm(nn.Module):
    """As in Llama: computed in float32, whatever the input is."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        """Normalizes the last dimension."""
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class Block(nn.Module):
    """A residual block with that norm."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = RMSNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        """Adds to its input."""
        return x + self.down(F.silu(self.up(self.norm(x))))


class Autocast(nn.Module):
    """Computes in bfloat16."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        """A small network."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.down(torch.tanh(self.up(x.float()))).float()


def _kernel(dtype):
    """An autograd.Function that takes one dtype only, with and without an error of a factor."""

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, factor):
            if x.dtype is not dtype:
                raise RuntimeError("expected another dtype")
            ctx.save_for_backward(x)
            ctx.factor = factor
            return x * x

        @staticmethod
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            return ctx.factor * 2 * x * gradient, None

    return Square.apply


class Scaled(torch.autograd.Function):
    """Multiplies the gradient by a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        """Returns its input."""
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        """Wrong, unless the factor is 1."""
        return gradient * ctx.factor, None


class Wrong(nn.Module):
    """A module whose gradient is multiplied by a factor."""

    def __init__(self, inner, factor):
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, x):
        """The same output."""
        return Scaled.apply(self.inner(x), self.factor)


def _floats():
    return nn.Sequential(nn.Linear(8, 8), Upcast())


class Upcast(nn.Module):
    """A softmax in float32."""

    def forward(self, x):
        """As it is often written."""
        return torch.softmax(x.float(), -1)


HALF = torch.ones(8, 8, dtype=torch.bfloat16)
WEIGHT = torch.linspace(-1, 1, 12).reshape(4, 3)
RIGHT = {
    "llama's norm": (lambda: RMSNorm(16), (4, 16), "float32"),
    "a block": (Block, (4, 16), "float32"),
    "a block in bfloat16": (lambda: Block().bfloat16(), (4, 16), "float32"),
    "float() inside": (_floats, (4, 8), "float32"),
    "constants": (lambda: lambda x: (x @ WEIGHT).tanh(), (3, 4), "float32"),
    "a float32 kernel": (lambda: lambda x: _kernel(torch.float32)(x, 1.0), (5,), "float32"),
    "a bfloat16 kernel": (
        lambda: lambda x: _kernel(torch.bfloat16)(x.bfloat16(), 1.0),
        (40,),
        "bfloat16",
    ),
    "relu": (lambda: nn.Sequential(_floats(), nn.Linear(8, 32), nn.ReLU()), (16, 8), "float32"),
    "autocast": (Autocast, (6, 8), "bfloat16"),
    "bfloat16 weights": (lambda: lambda x: F.linear(x.bfloat16(), HALF), (16, 8), "bfloat16"),
    "float16": (lambda: lambda x: torch.tanh(x.half()).float().sum(), (16, 8), "float16"),
    "in place": (lambda: lambda x: x.float().mul_(2).exp_().sum(), (16,), "float32"),
    "complex": (lambda: lambda x: torch.fft.fft(x.float()).abs().sum(), (16,), "float32"),
    "float64": (lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)), (4, 8), "float64"),
}
WRONG = {
    "llama's norm, doubled": (lambda: Wrong(RMSNorm(16), 2.0), (4, 16)),
    "a block, negated": (lambda: Wrong(Block(), -1.0), (4, 16)),
    "a block in bfloat16": (lambda: Wrong(Block(), 1.5).bfloat16(), (4, 16)),
    "ten percent in float32": (lambda: Wrong(_floats(), 1.1), (4, 8)),
    "two percent in float32": (lambda: Wrong(_floats(), 1.02), (4, 8)),
    "a float32 kernel": (lambda: lambda x: _kernel(torch.float32)(x, 0.5), (5,)),
    "a bfloat16 kernel": (lambda: lambda x: _kernel(torch.bfloat16)(x.bfloat16(), 2.0), (40,)),
    "autocast, doubled": (lambda: Wrong(Autocast(), 2.0), (6, 8)),
    "autocast, none": (lambda: Wrong(Autocast(), 0.0), (6, 8)),
    "detached": (lambda: lambda x: x.float() * x.detach().float(), (9,)),
    "float16": (lambda: lambda x: Scaled.apply(torch.tanh(x.half()), 2.0), (16, 8)),
    "half of float64": (lambda: Wrong(nn.Linear(8, 2), 1.001), (4, 8)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_gradients_are_right(name):
    """They are compared in the coarsest precision that they go through, which the result names."""
    torch.manual_seed(0)
    make, shape, precision = RIGHT[name]
    check = check_gradients(make(), torch.randn(shape))
    assert check.ok, str(check)
    assert check.precision == precision
    assert f"evaluations in {precision})" in str(check)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_gradients_are_found(name):
    """An error above what the precision hides is found in each of them."""
    torch.manual_seed(0)
    make, shape = WRONG[name]
    assert not check_gradients(make(), torch.randn(shape)).ok


def test_forward_mode_needs_float64():
    """Forward-mode derivatives are not compared in less, and the text says so."""
    with pytest.raises(
        TypeError, match="compares in float64, and this function computes in float32"
    ):
        check_gradients(_floats(), torch.randn(2, 8), forward_ad=True)

"""What explanations of real runs say: of divisors, of backwards of the user's own, of other tensors."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradwatch
from gradwatch.record.circumstances import circumstance
from gradwatch.record.explanation import facts_of

ROWS = torch.ones(3, 4)
ROWS[1] = 0.0


class Divides(nn.Module):
    """Divides what a layer returns by a function of it, of the rows or of a mask."""

    def __init__(self, divisor):
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        self.divisor = divisor

    def forward(self, x):
        """Return the mean."""
        h = self.layer(x)
        y = self.divisor(h)
        return (h / y).square().mean()


DIVISORS = {
    "norm": ("norm_divides", lambda h: h.norm(dim=-1, keepdim=True)),
    "norm and a factor": ("norm_divides", lambda h: 2 * h.norm(dim=-1, keepdim=True)),
    "root of squares": ("norm_divides", lambda h: h.pow(2).sum(-1, keepdim=True).sqrt()),
    "power": ("norm_divides", lambda h: (h * h).sum(-1, keepdim=True) ** 0.5),
    "torch.sqrt": ("norm_divides", lambda h: torch.sqrt(torch.sum(h**2, dim=-1, keepdim=True))),
    "einsum": ("norm_divides", lambda h: torch.einsum("ij,ij->i", h, h).sqrt()[:, None]),
    "two squares": ("norm_divides", lambda h: (h[:, :1] ** 2 + h[:, 1:2] ** 2).sqrt()),
    "root mean square": ("rms_zero", lambda h: h.square().mean(-1, keepdim=True).sqrt()),
    "std": ("spread_zero", lambda h: h.std(-1, keepdim=True)),
    "root of var": ("spread_zero", lambda h: h.var(-1, keepdim=True).sqrt()),
    "count": ("count_zero", lambda h: (h != 0).sum(-1, keepdim=True)),
    "mask": ("count_zero", lambda h: (h != 0).float().sum(-1, keepdim=True)),
    "sum": ("sum_zero", lambda h: h.abs().sum(-1, keepdim=True)),
    "largest": ("div_zero", lambda h: h.abs().amax(-1, keepdim=True)),
    "root of a layer": ("div_zero", lambda h: h.abs().sqrt()),
    "root of a product": ("div_zero", lambda h: (h @ torch.ones_like(h[:1]).mT).abs().sqrt()),
    "square of a sum": ("div_zero", lambda h: h.abs().sum(-1, keepdim=True) ** 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divisor", DIVISORS)
def test_what_a_divisor_was_made_of(divisor, dtype):
    """The advice for a count would leave short vectors as they are if it were given for a norm."""
    key, function = DIVISORS[divisor]
    torch.manual_seed(0)
    found = gradwatch.explain(Divides(function).to(dtype), ROWS.to(dtype))
    assert found.operation == "div"
    assert circumstance(facts_of(found)).key == key
    assert ("clamp(min=1)" in found.advice) == (key in ("count_zero", "sum_zero"))
    first = found.advice.find("clamp(min=1e-6)")
    assert key != "sum_zero" or 0 < first < found.advice.find("clamp(min=1)")


class Root(torch.autograd.Function):
    """A square root with a backward of its own."""

    @staticmethod
    def forward(ctx, x):
        """Return the root."""
        y = x.sqrt()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, gradient):
        """Divide by twice the root."""
        (y,) = ctx.saved_tensors
        return gradient / (2 * y)


class Calls(nn.Module):
    """A layer, and a function of what it returns."""

    def __init__(self, function):
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        self.function = function

    def forward(self, x):
        """Return the mean."""
        return self.function(self.layer(x)).mean()


def _hooked(h):
    h.register_hook(lambda gradient: gradient / torch.zeros(()))
    return h * 1.0


@pytest.mark.parametrize("function", [lambda h: Root.apply(h.abs()), _hooked])
def test_a_backward_of_the_user_s_own(function):
    """It divides by 0; it is not the gradient of a division."""
    found = gradwatch.explain(Calls(function), ROWS)
    assert (found.operation, found.phase) == ("div", "backward")
    assert [one.name for one in found.inputs] == ["self", "other"]
    text = str(found)
    assert "born in the backward of " in text
    assert "This is division by 0: " in text
    assert "of the result (" in text
    assert "the gradient of" not in text


def test_a_backward_of_the_user_s_own_is_followed():
    """The 0 that it divides by goes back to the forward."""
    found = gradwatch.explain(Calls(lambda h: Root.apply(h.abs())), ROWS)
    assert found.made_possible_by.operation == "mm"
    assert found.made_possible_by.module == "layer"


SPOILED = torch.tensor([1.0, math.nan, 1.0, 1.0])


class Holds(nn.Module):
    """Multiplies with a tensor that it holds, as an attribute or a buffer, or that a variable holds."""

    def __init__(self, how):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.how = how
        if how == "attribute":
            self.ema = SPOILED.clone()
        elif how == "buffer":
            self.register_buffer("ema", SPOILED.clone())

    def forward(self, x):
        """Return the mean."""
        w = SPOILED if self.how == "constant" else self.ema
        return (self.layer(x) * w).mean()


def test_a_constant_is_no_data():
    """Neither an argument nor a data set is spoken of."""
    found = gradwatch.explain(Holds("constant"), ROWS)
    assert (found.origin, found.argument) == ("input", "SPOILED")
    text = str(found)
    assert "it was in another tensor that the forward uses" in text
    assert "1 of 4 elements of SPOILED (float32, [4]) is NaN." in text
    assert "data" not in text + found.summary


@pytest.mark.parametrize("how", ["attribute", "buffer"])
def test_what_the_model_holds(how):
    """Of an attribute it is said that nothing puts it back."""
    found = gradwatch.explain(Holds(how), ROWS)
    assert (found.origin, found.parameter) == ("weights", "ema")
    text = str(found)
    assert "NaN: it was in the model before the forward." in text
    assert "1 of 4 elements of the model's ema (float32, [4]) is NaN." in text
    assert ("register_buffer" in text) == (how == "attribute")
    assert ("checkpoint" in found.advice) == (how == "buffer")


def test_targets_are_data():
    """Also where only the loss holds them."""
    y = torch.full((3, 4), math.nan)
    found = gradwatch.explain(nn.Linear(4, 4), ROWS, loss=lambda output: F.mse_loss(output, y))
    assert "it came with the data" in str(found)
    assert "elements of the input y " in str(found)
    assert "in the data set" in found.advice


def test_in_place_the_name_keeps_its_underscore():
    """The record has torch's name, the text the one that reads well."""
    found = gradwatch.explain(Calls(lambda h: (h * 0.0).abs().log_()), ROWS)
    assert found.operation == "log_"
    assert "This is log of 0: " in str(found)

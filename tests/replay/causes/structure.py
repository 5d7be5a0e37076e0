"""How models are put together: modules that are shared, wrapped, called in loops, and odd lines."""

import random
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from tests.replay.causes import formulas
from tests.replay.causes.cause import Lambda, Net, Training, batch, cause, square


@cause("log", module="3", phase="forward")
def sequential_alone():
    """The model is a Sequential, and a lambda in it is the cause."""
    inner = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    log = Lambda(lambda x: x.log())  # <- born
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), inner, log, nn.Linear(3, 1))
    return Training(model, torch.randn(4, 4), loss=square)


@cause("exp", module="blocks.2", phase="forward", examples=(3,), loop="operation")
def one_block_of_several():
    """The same class four times in a ModuleList, and only the third overflows."""

    class Block(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.fc, self.factor = nn.Linear(4, 4), factor

        def forward(self, x):
            return x + (1 + (self.fc(x).abs() * self.factor).exp()).log1p()  # <- born

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    blocks = nn.ModuleList(map(Block, (1e-3, 1e-3, 1.0, 1e-3)))
    return Training(Net(forward, blocks=blocks), batch(3, 1e4), loss=square)


@cause("log10", module="decibel", phase="forward", examples=(1,))
def module_that_is_called_twice():
    """The second call of a shared module is the cause."""

    def decibel(x):
        return 20 * torch.log10(x)  # <- born

    def forward(self, left, right):
        return self.fc(self.decibel(left)) + self.decibel(self.fc(right).square())

    model = Net(forward, decibel=Lambda(decibel))
    return Training(model, torch.rand(4, 4) + 0.1, batch(1, 0.0), loss=square)


@cause("sqrt", module="encoder", phase="backward", examples=(2,))
def module_under_two_names():
    """A module is called by its second name, and named by its first."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4, bias=False)

        def forward(self, x):
            return self.fc(x).abs().sqrt()  # <- born

    def forward(self, a, b):
        return self.encoder(a) - self.alias(b)

    encoder = Encoder()
    model = Net(forward, encoder=encoder, alias=encoder)
    return Training(model, torch.randn(4, 4), batch(2, 0.0), loss=square)


@cause("sqrt", module="encoder", phase="backward", examples=(1,), at=formulas.length)
def norm_of_a_helper():
    """A helper in another file, called by a decorated forward: the line is that of the helper."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4, bias=False)

        @formulas.checked
        def forward(self, x):
            h = self.fc(x)
            return h / (formulas.length(h)[:, None] + 1e-6)

    def forward(self, x):
        return self.encoder(x) * self.fc.weight.sum()

    return Training(Net(forward, encoder=Encoder()), batch(1, 0.0), loss=square)


@cause("log", module="layers.1", phase="forward", examples=(2,))
def lambda_of_a_table():
    """An activation that is looked up by its name."""
    table = {
        "square": lambda x: x.square(),
        "log": lambda x: x.log(),  # <- born
    }

    def forward(self, x):
        x = self.fc(x)
        for layer in self.layers:
            x = layer(x)
        return x

    layers = nn.ModuleList([Lambda(table["square"]), Lambda(table["log"])])
    return Training(Net(forward, layers=layers), batch(2, 0.0), loss=square)


@cause("div", module="", phase="forward", examples=(1,))
def object_that_is_no_module():
    """A dataclass with a method `__call__`."""

    @dataclass
    class Scaler:
        dim: int

        def __call__(self, x):
            low, high = x.amin(self.dim, True), x.amax(self.dim, True)
            return (x - low) / (high - low)  # <- born

    scale = Scaler(-1)
    return Training(Net(lambda self, x: self.fc(scale(x))), batch(1, 3.0), loss=square)


@cause("log", module="", phase="forward", examples=(0,))
def call_over_several_lines():
    """The line is that of the call within the statement."""

    def forward(self, x):
        return (
            torch.log(  # <- born
                self.fc(
                    x,
                ).square(),
            ).clamp(max=10)
            * 0.5
        )

    return Training(Net(forward), batch(0, 0.0), loss=square)


@cause("div", phase="forward")
def parametrization_of_a_zero_row():
    """A row of a weight is divided by its norm whenever the weight is read."""

    class UnitRows(nn.Module):
        def forward(self, weight):
            return weight / weight.norm(dim=1, keepdim=True)  # <- born

    model = Net(lambda self, x: self.fc(x))
    with torch.no_grad():
        model.fc.weight[1] = 0
    # Registration evaluates it once, which is healthy or not as any other.
    parametrize.register_parametrization(model.fc, "weight", UnitRows(), unsafe=True)
    return Training(model, torch.randn(4, 4), loss=square)


@cause("log", module="teacher", phase="forward", examples=(2,))
def teacher_without_gradient():
    """A module under no_grad, of which the student gets 0 times -Inf."""

    class Teacher(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            p = self.fc(x).softmax(-1)  # <- possible
            return p, torch.log(p)  # <- born

    def forward(self, x):
        with torch.no_grad():
            p, scores = self.teacher(x)
        own = self.fc(x)[:, :3].log_softmax(-1)
        return (p * (scores - own)).sum(-1).mean() * own.mean()

    return Training(Net(forward, teacher=Teacher()), batch(2, 1e4))


@cause("sqrt", module="heads.length", phase="backward", examples=(3,), loop="operation")
def output_that_is_an_object():
    """A model with several heads in a ModuleDict, that returns an object with a loss."""

    def length(h):
        return torch.sqrt(h.pow(2).sum(-1))  # <- born

    def forward(self, x):
        h = self.fc(x)
        parts = {name: head(h).mean() for name, head in self.heads.items()}
        return SimpleNamespace(loss=sum(parts.values()), parts=parts)

    heads = nn.ModuleDict({"value": nn.Linear(4, 1), "length": Lambda(length)})
    return Training(Net(forward, heads=heads), batch(3, 0.0), loss=lambda output: output.loss)


@cause("div", module="", phase="forward", loop="operation")
def branch_by_a_random_number():
    """The way through the forward depends on three generators of random numbers."""

    def forward(self, x):
        h = self.fc(x)
        for _ in range(9):
            if self.generator.random() < 0.3:
                h = h / (h - h)  # <- born
            elif random.random() < 0.5:
                h = h * 2
            elif np.random.rand() < 0.5:
                h = h + torch.rand(())
        return h.mean()

    model = Net(forward)
    model.generator = random.Random(3)
    return Training(model, torch.randn(3, 4))

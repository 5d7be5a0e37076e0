"""NaN and Inf in the data, the targets, the weights, buffers and constants."""

import copy
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.replay.causes.cause import Net, Training, batch, cause, square

NAN, INF = float("nan"), float("inf")


class Linear(nn.Module):
    """A layer, and the name of an argument."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        """Call the layer."""
        return self.fc(x)


@cause(origin="input", argument="x", examples=(3,), loop="input")
def number_that_is_missing():
    """A NaN in an argument."""
    x = torch.randn(4, 4)
    x[3, 2] = NAN
    return Training(Linear(), x, loss=square)


@cause(origin="input", argument="x", examples=(0, 2), loop="input")
def infinities_of_both_signs():
    """An Inf and a -Inf in an argument, of which a linear layer makes NaN."""
    x = torch.randn(4, 4)
    x[0, 1], x[2, 3] = INF, -INF
    return Training(Linear(), x, loss=square)


@cause(origin="input", argument="x", examples=(3,), loop="input")
def number_that_is_missing_in_a_deep_copy():
    """Memory is copied byte by byte, below the operations that tensors of a dtype have."""

    class Model(Linear):
        def forward(self, x):
            return self.fc(copy.deepcopy(copy.deepcopy(x)))

    x = torch.randn(4, 4)
    x[3, 2] = NAN
    return Training(Model(), x, loss=square)


@cause("log", phase="forward", examples=(1,), loop="operation")
def bad_result_that_is_deeply_copied():
    """The copy is no place where anything begins."""

    class Model(Linear):
        def forward(self, x):
            logs = torch.log(x)  # <- born
            return self.fc(copy.deepcopy(logs))

    return Training(Model(), batch(1, -1.0, draw=lambda shape: 1 + torch.rand(shape)), loss=square)


class Pair(NamedTuple):
    """Two tensors."""

    now: Tensor
    next: Tensor


@dataclass
class Sample:
    """An image and a label."""

    image: Tensor
    label: Tensor


@cause(origin="input", argument="batch['b'].next", examples=(0,), loop="input")
def tuple_in_a_dict():
    """The path to the tensor within the batch is told."""

    class Model(Linear):
        def forward(self, batch):
            return self.fc(batch["b"].now) - self.fc(batch["b"].next)

    rows = batch((0, 1), NAN)
    return Training(Model(), {"a": 1, "b": Pair(torch.randn(4, 4), rows)}, loss=square)


@cause(origin="input", argument="batch.image", examples=(2,))
def field_of_a_dataclass():
    """A batch that is an object."""

    class Model(Linear):
        def forward(self, batch):
            return F.cross_entropy(self.fc(batch.image), batch.label)

    return Training(Model(), Sample(batch((2, 1), NAN), torch.tensor([0, 1, 0, 1])))


@cause(origin="input", argument="labels", examples=(2,), loop="input")
def target_that_is_an_argument():
    """A target of NaN that the model is given by keyword."""

    class Model(Linear):
        def forward(self, x, *, labels):
            return F.smooth_l1_loss(self.fc(x), labels)

    return Training(Model(), torch.randn(4, 4), labels=batch(2, NAN, 4, 2))


@cause(origin="input", argument="target", examples=(2,), loop="input")
def target_of_the_loss():
    """A target of NaN that only the loss outside of the model sees."""
    target = batch(2, NAN, 4, 2)
    return Training(Linear(), torch.randn(4, 4), loss=lambda output: F.mse_loss(output, target))


@cause(origin="weights", parameter="a.weight", loop="weights")
def weight_that_was_bad_before():
    """A NaN in a parameter."""
    model = Net(lambda self, x: self.fc(torch.tanh(self.a(x))), a=nn.Linear(4, 4))
    with torch.no_grad():
        model.a.weight[2, 3] = NAN
    return Training(model, torch.randn(4, 4), loss=square)


@cause(origin="weights", parameter="embed.weight")
def row_of_an_embedding():
    """An Inf in a row that only one example looks up."""

    def forward(self, ids):
        return self.fc(self.rnn(self.embed(ids))[1][0])

    model = Net(forward, embed=nn.Embedding(9, 4), rnn=nn.GRU(4, 4, batch_first=True))
    with torch.no_grad():
        model.embed.weight[7] = INF
    return Training(model, torch.tensor([[1, 2], [3, 7], [4, 5]]), loss=square)


@cause(origin="weights", parameter="bn.running_var", loop="weights")
def statistic_of_a_frozen_norm():
    """A NaN in a buffer."""
    model = Net(lambda self, x: self.bn(self.fc(x)), bn=nn.BatchNorm1d(4))
    model.bn.eval().running_var[1] = NAN
    return Training(model, torch.randn(4, 4), loss=square)


@cause(origin="weights", parameter="scale", loop="weights")
def attribute_that_is_no_buffer():
    """A NaN in a tensor that is a plain attribute of the model."""

    def forward(self, x):
        return self.fc(x) * self.scale  # <- born

    model = Net(forward)
    model.scale = torch.tensor([1.0, NAN, 1.0, 1.0])
    return Training(model, torch.randn(4, 4), loss=square)


@cause(origin="input", loop="input")
def constant_of_numpy():
    """A NaN that was computed outside of torch, and is no argument."""

    def forward(self, x):
        with np.errstate(invalid="ignore"):
            scale = np.sqrt(np.array([1.0, -1.0, 1.0, 1.0], dtype="float32"))
        return self.fc(x) * torch.from_numpy(scale)  # <- born

    return Training(Net(forward), torch.randn(4, 4), loss=square)


@cause("mul", module="", phase="forward", examples=(0, 1, 2, 3))
def number_of_python():
    """A constant of NaN that is a number of Python."""

    def forward(self, x):
        return self.fc(x) * self.scale  # <- born

    model = Net(forward)
    model.scale = NAN
    return Training(model, torch.randn(4, 4), loss=square)


@cause("div", module="", phase="forward")
def weight_that_is_zero():
    """A parameter that is finite, and divided by, is no bad weight."""

    def forward(self, x):
        return self.fc(x) / self.temperature.weight  # <- born

    model = Net(forward, temperature=nn.Linear(1, 1, bias=False))
    nn.init.zeros_(model.temperature.weight)
    return Training(model, torch.randn(4, 4), loss=square)


@cause("sqrt", module="", phase="backward", examples=(0,), loop="operation")
def numbers_that_are_missing_and_filled():
    """NaN in the data that the model replaces, and a square root of 0 beside it."""

    def forward(self, x):
        x = torch.where(torch.isnan(x), torch.zeros_like(x), x)
        return self.fc(x).abs().sqrt().mean()  # <- born

    x = torch.randn(4, 4)
    x[0], x[1, 1] = 0, NAN
    return Training(Net(forward), x)


@cause("log", module="first", phase="forward", examples=(2,))
def two_causes():
    """Of two causes without anything in common, the one that was first."""

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4, bias=False)

        def forward(self, x):
            return (self.fc(x) ** 2).log()  # <- born

    def forward(self, x, divisor):
        return self.fc(self.first(x)) / divisor

    divisor = batch(3, 0.0, 4, 1, draw=torch.ones)
    return Training(Net(forward, first=First()), batch(2, 0.0), divisor, loss=square)

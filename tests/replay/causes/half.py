"""float16, bfloat16 and autocast."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.replay.causes.cause import Lambda, Net, Training, batch, cause, square


@cause("pow", module="norm", phase="forward", examples=(2,), loop="operation")
def square_beyond_float16():
    """400 squared is no float16."""

    def normalize(x):
        size = x.pow(2).mean(-1, keepdim=True)  # <- born
        return x / (size + 1e-5).sqrt() + size * 1e-6

    def forward(self, x):
        return self.norm(self.fc(x))

    model = Net(forward, norm=Lambda(normalize)).half()
    nn.init.eye_(model.fc.weight)
    return Training(model, batch(2, 400.0).half(), loss=square)


@cause("div", module="", phase="forward", examples=(3,), loop="operation")
def epsilon_below_float16():
    """1e-8 is 0 in float16."""

    def forward(self, x):
        h = self.fc(x)
        return h / (h.abs().sum(-1, keepdim=True) + 1e-8)  # <- born

    return Training(Net(forward).half(), batch(3, 0.0).half(), loss=square)


@cause("sum", module="", phase="forward", examples=(1,))
def sum_beyond_float16():
    """Each of the numbers is finite, and so is their mean."""

    def forward(self, x):
        return x.sum(dim=1) / x.shape[1] * self.fc.weight[0, 0]  # <- born

    x = torch.ones(4, 2000)
    x[1] = 40
    return Training(Net(forward).half(), x.half(), loss=square)


@cause("to", module="", phase="forward", examples=(1,))
def cast_to_float16():
    """A number of float32 that float16 does not have."""

    def forward(self, x):
        return self.fc(x).to(torch.float16) * 1e-3  # <- born

    return Training(Net(forward), batch(1, 1e6), loss=square)


@cause("mse_loss", phase="forward", loop="operation")
def error_beyond_float16():
    """A loss of torch, outside of the model, whose square is too large."""

    def loss(output):
        error = F.mse_loss(output, target)  # <- born
        return error / (1 + error)

    target = batch(1, 1000.0, 4, 2).half()
    return Training(nn.Linear(4, 2).half(), torch.randn(4, 4).half(), loss=loss)


@cause("log", module="", phase="forward", examples=(2,))
def sigmoid_that_bfloat16_rounds_to_one():
    """1 - p is 0 where p is close to 1."""

    def forward(self, x):
        return torch.log(1 - torch.sigmoid(self.fc(x)))  # <- born

    model = Net(forward).bfloat16()
    nn.init.ones_(model.fc.weight)
    return Training(model, batch(2, 2.5, draw=torch.rand).bfloat16() - 0.5, loss=square)


@cause("mul", module="", phase="backward")
def gradient_beyond_float16():
    """The forward is finite, and a multiplication in the backward is not."""

    def forward(self, x, large):
        return (self.fc(x) * 1e-3 * large).sum()  # <- born

    x, large = torch.randn(4, 4).half() * 0.01, torch.tensor(6e4).half()
    return Training(Net(forward).half(), x, large, loss=lambda output: output * 2)


@cause("mm", module="", phase="forward", examples=(0,), loop="operation")
def linear_layer_under_autocast():
    """A matrix product that autocast computes in float16."""

    def forward(self, x):
        with torch.autocast("cpu", torch.float16):
            return torch.mm(x, self.fc.weight)  # <- born

    model = Net(forward)
    nn.init.constant_(model.fc.weight, 8.0)
    return Training(model, batch(0, 6e4), loss=square)


@cause("log", module="head", phase="forward", examples=(1,), loop="operation")
def softmax_under_autocast():
    """A probability that is 0, in a head within a region of bfloat16."""

    def head(logits, labels):
        p = logits.softmax(-1)  # <- possible
        return -torch.log(p.gather(1, labels[:, None])).mean()  # <- born

    def forward(self, x, labels):
        with torch.autocast("cpu", torch.bfloat16):
            return self.head(self.fc(x), labels)

    model, x = Net(forward, head=Lambda(head)), batch(1, 1e4)
    return Training(model, x, model.fc(x).argmin(1))

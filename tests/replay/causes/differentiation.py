"""Custom functions, hooks, double backward, checkpoints and torch.func."""

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.replay.causes.cause import Lambda, Net, Training, batch, cause, square


class Root(torch.autograd.Function):
    """A square root with a backward of its own."""

    @staticmethod
    def forward(ctx, x):
        """Take the root."""
        y = x.sqrt()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, gradient):
        """Divide by twice the root."""
        (y,) = ctx.saved_tensors
        return gradient / (2 * y)  # <- born


@cause("div", module="root", phase="backward", examples=(2,), at=Root, loop="operation")
def backward_of_a_custom_function():
    """The line is in the backward that the user wrote."""

    def forward(self, x):
        return self.root(self.fc(x).abs()).mean()

    return Training(Net(forward, root=Lambda(Root.apply)), batch(2, 0.0))


class Rounded(torch.autograd.Function):
    """A straight-through rounding."""

    @staticmethod
    def forward(ctx, x, scale):
        """Round to multiples of the scale."""
        return torch.round(x / scale) * scale  # <- born

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        """Let the gradient through."""
        return gradient, None


@cause("div", module="quantize", phase="forward", at=Rounded, loop="operation")
def forward_of_a_custom_function():
    """0 divided by a scale of 0, where no gradient is recorded."""

    def forward(self, x):
        return self.out(self.quantize(self.fc(x))).mean()

    def quantize(x):
        return Rounded.apply(x, x.detach().abs().amax())

    model = Net(forward, quantize=Lambda(quantize), out=nn.Linear(4, 1))
    return Training(model, torch.zeros(3, 4))


class Reversed(torch.autograd.Function):
    """A reversal of the gradient with a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        """Return the same numbers."""
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        """Multiply by the factor."""
        return -ctx.factor * gradient, None  # <- born


@cause("mul", module="", phase="backward", at=Reversed)
def factor_that_is_infinite():
    """An Inf that is a number of Python and comes in only in the backward."""

    def forward(self, x):
        return Reversed.apply(self.fc(x), float("inf"))

    return Training(Net(forward), torch.randn(4, 4), loss=square)


@cause("div", module="fc", phase="backward", loop="operation")
def hook_on_a_gradient():
    """A lambda in a hook divides a gradient of 0 by its norm."""

    def forward(self, x, on):
        h = self.fc(x)
        h.register_hook(lambda gradient: gradient / gradient.norm())  # <- born
        return h.square().mean() * on

    return Training(Net(forward), torch.randn(4, 4), 0.0)


@cause("div", phase="forward", examples=(2,))
def hook_on_an_output():
    """A forward hook divides a row of zeros by its norm."""

    def unit(module, args, output):
        return output / output.norm(dim=-1, keepdim=True)  # <- born

    model = Net(lambda self, x: self.fc(x))
    model.fc.register_forward_hook(unit)
    return Training(model, batch(2, 0.0), loss=square)


@cause("sqrt", module="", phase="backward", loop="operation")
def penalty_of_a_gradient_of_zero():
    """A double backward through a critic that is flat everywhere."""

    def forward(self, real, fake):
        part = torch.rand(len(real), 1)
        x = (part * real + (1 - part) * fake).requires_grad_()
        (gradient,) = torch.autograd.grad(self.critic(x).sum(), x, create_graph=True)
        norm = torch.sqrt((gradient**2).sum(1))  # <- born
        return self.critic(fake).mean() - self.critic(real).mean() + ((norm - 1) ** 2).mean()

    critic = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    nn.init.constant_(critic[0].bias, -100.0)
    return Training(Net(forward, critic=critic), torch.randn(3, 4), torch.randn(3, 4))


@cause("sqrt", module="features", phase="backward")
def derivative_within_the_forward():
    """The forward calls autograd.grad, and the derivative is infinite at one point."""

    def features(t):
        return torch.sqrt(t)  # <- born

    def forward(self, t):
        t = t.detach().requires_grad_()
        u = self.fc(self.features(t))
        (slope,) = torch.autograd.grad(u, t, torch.ones_like(u), create_graph=True)
        return (slope + u).square().mean()

    return Training(Net(forward, features=Lambda(features)), batch(0, 0.0, draw=torch.rand))


class Block(nn.Module):
    """A log of a softmax."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        """Add the log to the input."""
        p = F.softmax(self.fc(x), -1)  # <- possible
        return x + torch.log(p)  # <- born


class RootBlock(nn.Module):
    """A square root with an infinite gradient at 0."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        """Multiply by the root."""
        return x * torch.sqrt(self.fc(x).pow(2).sum(-1, keepdim=True))  # <- born


def checkpointed(block, reentrant, row):
    """Return a training with two checkpoints and a dropout, the second checkpoint being the cause."""

    def forward(self, x):
        x = self.fc(x)
        for one in self.blocks:
            x = checkpoint(one, x, use_reentrant=reentrant)
        return self.drop(x)

    blocks = nn.ModuleList([nn.Linear(4, 4, bias=False), block])
    model = Net(forward, blocks=blocks, drop=nn.Dropout(0.1))
    return Training(model, batch(1, row), loss=square)


@cause("log", module="blocks.1", phase="forward", examples=(1,), at=Block, loop="operation")
def forward_of_a_checkpoint():
    """A checkpoint without reentering autograd."""
    return checkpointed(Block(), False, 1e4)


@cause("log", module="blocks.1", phase="forward", examples=(1,), at=Block, loop="operation")
def forward_of_a_reentrant_checkpoint():
    """A checkpoint that runs its forward without a graph."""
    return checkpointed(Block(), True, 1e4)


@cause("sqrt", module="blocks.1", phase="backward", examples=(1,), at=RootBlock, loop="operation")
def backward_of_a_checkpoint():
    """The forward is run again in the backward, and has the line of the first run."""
    return checkpointed(RootBlock(), False, 0.0)


@cause("sqrt", module="blocks.1", phase="backward", examples=(1,), at=RootBlock, loop="operation")
def backward_of_a_reentrant_checkpoint():
    """A backward within the backward."""
    return checkpointed(RootBlock(), True, 0.0)


@cause("sqrt", module="outer.inner", phase="backward", at=RootBlock)
def checkpoint_in_a_checkpoint():
    """The second run of the outer one has the inner one, which is run again later."""

    def outer(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)

    def forward(self, x):
        return checkpoint(self.outer, self.fc(x), use_reentrant=False)

    model = Net(forward, outer=Net(outer, inner=RootBlock()))
    return Training(model, batch(1, 0.0), loss=square)


@cause("sqrt", module="body.1", phase="backward", at=RootBlock)
def checkpoint_of_a_sequential():
    """Segments of a Sequential."""

    def forward(self, x):
        return checkpoint_sequential(self.body, 2, self.fc(x), use_reentrant=False)

    body = nn.Sequential(nn.Linear(4, 4, bias=False), RootBlock(), nn.Linear(4, 2))
    return Training(Net(forward, body=body), batch(1, 0.0), loss=square)


@cause("div", module="", phase="forward")
def division_under_vmap():
    """torch.func.vmap over a function of one example."""

    def forward(self, x):
        unit = torch.func.vmap(lambda row: row / row.norm())(self.fc(x))  # <- born
        return (unit - 1).square().mean()

    return Training(Net(forward), batch(0, 0.0))


@cause("sqrt", module="", phase="backward", examples=(2,))
def derivative_by_torch_func():
    """torch.func.grad at a point where the derivative is infinite."""

    def slope(t):
        return torch.func.grad(lambda one: one.sqrt().sum())(t)  # <- born

    def forward(self, t):
        return self.fc(slope(t)).square().mean()

    return Training(Net(forward), batch(2, 0.0, draw=torch.rand))


@cause("log", module="learner", phase="forward", examples=(3,))
def functional_call_in_an_inner_loop():
    """A module that is called with weights that are no parameters."""

    class Learner(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return torch.log(self.fc(x).softmax(-1))  # <- born

    def forward(self, support, query):
        weights = dict(self.learner.named_parameters())
        inner = torch.func.functional_call(self.learner, weights, (support,)).mean()
        slopes = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
        fast = {n: w - 0.1 * g for (n, w), g in zip(weights.items(), slopes, strict=True)}
        return torch.func.functional_call(self.learner, fast, (query,)).mean()

    return Training(Net(forward, learner=Learner()), torch.randn(4, 4), batch(3, 1e4))


@cause("exp", module="", phase="forward", examples=(1,))
def branch_that_where_leaves_out():
    """0 times Inf in the gradient of a branch that was not chosen."""

    def forward(self, x):
        h = self.fc(x)
        return torch.where(h > 20, h, torch.log1p(torch.exp(h)))  # <- born

    model = Net(forward)
    nn.init.eye_(model.fc.weight)
    return Training(model, batch(1, 200.0), loss=square)


@cause("div", module="", phase="backward", examples=(2,))
def divisor_too_small_for_its_gradient():
    """The quotient is finite, and its derivative by the divisor is too large."""

    def forward(self, a, b):
        return a / (self.fc.weight[0, 0].abs() * b)  # <- born

    a, b = torch.rand(4), torch.rand(4) + 0.5
    a[2], b[2] = 1e-5, 1e-30
    return Training(Net(forward), a, b, loss=lambda output: output.mean())

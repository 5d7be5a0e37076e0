"""Infinities that are meant, and healthy numbers: they are not blamed."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.replay.causes.cause import Net, Training, batch, cause

INF = float("inf")


def beside_a_root(meant):
    """Return a training in which one function is innocent, and a square root at 0 is the cause."""

    def forward(self, x):
        innocent = meant(self.other(x + 1))
        return innocent + root(self.fc(x))

    return Training(Net(forward, other=nn.Linear(4, 4)), batch(1, 0.0))


def root(h):
    """Return a mean of roots, each with an infinite gradient at 0."""
    return h.abs().sqrt().mean()  # <- born


def innocent(meant):
    """Add the cause beside a function whose infinities are meant."""

    def make():
        return beside_a_root(meant)

    make.__name__ = meant.__name__
    cause("sqrt", module="", phase="backward", examples=(1,), at=root)(make)
    return meant


@innocent
def causal_mask(h):
    """-Inf that a softmax makes 0."""
    scores = h @ h.T + torch.triu(torch.full((4, 4), -INF), 1)
    return scores.softmax(-1).square().mean()


@innocent
def log_of_zero_under_an_exp(h):
    """A log of 0 whose exp is 0 again."""
    return torch.exp(torch.log((h.detach() > 0).float()) + h).mean()


@innocent
def forward_algorithm_from_one_state(h):
    """Scores that begin at -Inf but for one state."""
    alpha = torch.tensor([0.0, -INF, -INF, -INF])
    for row in h:
        alpha = torch.logsumexp(alpha[:, None] + torch.zeros(4, 4), 0) + row
    return torch.logsumexp(alpha, 0)


@innocent
def degree_of_zero_that_is_set_to_zero(h):
    """An Inf that a masked assignment in place removes."""
    scale = torch.tensor([2.0, 0, 1, 4]).pow(-0.5)
    scale[scale == INF] = 0
    return (scale[:, None] * h).mean()


@innocent
def clamped_weight_without_gradient(h):
    """1 divided by 0, clamped, where no gradient passes."""
    return ((1 / h.detach().relu()).clamp(max=10) * h).mean()


@innocent
def targets_that_are_missing(h):
    """NaN in the targets that are left out by an index."""
    target = torch.tensor([1.0, float("nan"), 2.0, float("nan")])
    known = ~torch.isnan(target)
    return ((h[:, 0][known] - target[known]) ** 2).mean()


@innocent
def metric_that_nobody_uses(h):
    """0 divided by 0 in a result that the loss does not use."""
    metric = (h - h) / (h - h)
    return h.mean() + 0 * metric.isnan().sum()


@innocent
def choice_that_is_forbidden(h):
    """A categorical distribution with a masked class."""
    mask = torch.tensor([True, False, False, False])
    policy = torch.distributions.Categorical(logits=h.masked_fill(mask, -INF), validate_args=False)
    return -policy.log_prob(torch.tensor([1, 2, 3, 1])).mean()


@cause(origin="not_found")
def healthy_operations_at_zero():
    """Norms and angles at 0 have gradients of torch that are finite."""

    def forward(self, x):
        h = self.fc(x)
        angle = torch.atan2(h[:, 0], h[:, 1])
        return (h.norm(dim=-1) + h.std(dim=-1) + F.normalize(h).sum(-1) + angle).mean()

    return Training(Net(forward), batch(2, 0.0))


@cause("div", module="", phase="forward")
def division_beside_a_meant_infinity():
    """A minimum over places that are left out by Inf, and then a division of 0 by 0."""

    def forward(self, x, seen, weight):
        cost = torch.where(seen, self.fc(x).abs(), torch.full((4, 4), INF))
        return (cost.amin(1) * weight).sum() / weight.sum()  # <- born

    seen = torch.rand(4, 4) > 0.4
    seen[:, 0] = True
    return Training(Net(forward), torch.randn(4, 4), seen, torch.zeros(4))


@cause("logsumexp", module="", phase="backward")
def row_that_is_all_masked():
    """A logsumexp of -Inf is -Inf, and its gradient is NaN."""

    def forward(self, x, mask):
        scores = self.fc(x) + torch.zeros(3, 4).masked_fill(mask, -INF)
        value = torch.logsumexp(scores, -1)  # <- born
        return torch.where(value == -INF, torch.zeros_like(value), value).mean()

    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[2] = True
    return Training(Net(forward), torch.randn(3, 4), mask)


@cause("sub", module="", phase="forward", examples=(2,))
def maximum_of_a_masked_row():
    """-Inf minus -Inf."""

    def forward(self, x, mask):
        h = self.fc(x).masked_fill(mask, -INF)
        return (h - h.max(-1, keepdim=True).values).exp().mean()  # <- born

    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[2] = True
    return Training(Net(forward), torch.randn(3, 4), mask)


@cause("mul", module="", phase="forward", examples=(2,))
def entropy_of_a_masked_choice():
    """A probability of 0 times its log."""

    def forward(self, x, mask):
        scores = self.fc(x).log_softmax(-1).masked_fill(mask, -INF)
        return -(scores.exp() * scores).sum(-1).mean()  # <- born

    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[2, 1] = True
    return Training(Net(forward), torch.randn(3, 4), mask)

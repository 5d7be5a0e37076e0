"""The parts of examples where the module returns its loss: every form a loss may have."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradwatch.replay.largest import MOST, largest_examples
from gradwatch.replay.live import Kernels, LiveGraph
from tests.support import float64

BATCH = 8


def fixed(*shape):
    """Numbers that are always the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


LABELS = torch.randint(0, 4, (BATCH,), generator=torch.Generator().manual_seed(3))
WEIGHTS = torch.tensor([1.0, 2.0, 3.0, 4.0])
IGNORED = LABELS.where(torch.arange(BATCH) != 2, -100)
WORDS = torch.randint(0, 9, (BATCH, 7), generator=torch.Generator().manual_seed(3))


def _mlp(outputs=4):
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, outputs))


def _language_model():
    return nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9))


@dataclass
class Case:
    """`loss(model, x)` is what the module returns, `rows(model, x)` what each example adds to it."""

    loss: Callable
    rows: Callable
    model: Callable = _mlp
    x: Callable = lambda: fixed(BATCH, 6)


def _cross_entropy(model, x, **options):
    options = {k: v.to(x.dtype) if torch.is_tensor(v) else v for k, v in options.items()}
    return F.cross_entropy(model(x), LABELS, **options)


def _variational(model, x, reduced):
    mean, log_variance = model[0](x).chunk(2, 1)
    output = model[1](mean + torch.exp(log_variance / 2) * fixed(BATCH, 4).to(x.dtype))
    divergence = 1 + log_variance - mean.square() - log_variance.exp()
    if reduced:
        return F.mse_loss(output, x, reduction="sum") / BATCH - 0.5 * divergence.sum() / BATCH
    return ((output - x).square().sum(1) - 0.5 * divergence.sum(1)) / BATCH


def _triplet(model, x, reduction="mean"):
    return F.triplet_margin_loss(model(x), model(x + 0.3), model(x.flip(1)), reduction=reduction)


def _contrastive(model, x, reduction="mean"):
    z = F.normalize(model(x))
    return F.cross_entropy(z @ z.T / 0.5, torch.arange(BATCH).roll(1), reduction=reduction)


def by_chain_rule(reduce, before=lambda output: output):
    """The rows of a loss that is no sum over examples: by the gradient that arrives at them."""

    def rows(model, x):
        values = before(model(x))
        (gradient,) = torch.autograd.grad(reduce(values), values, retain_graph=True)
        return (values * gradient).flatten(1).sum(1)

    return lambda model, x: reduce(before(model(x))), rows


def _standardized(output):
    return (output - output.mean(0)) / output.std(0)


def _cross_correlation(z):
    return (z.T @ z / BATCH - torch.eye(8, dtype=z.dtype)).square().sum()


def _gradient_penalty(model, x):
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return (gradient.norm(dim=1) - 1).square()


def _policy(model, x):
    chosen = torch.distributions.Categorical(logits=model(x)).log_prob(LABELS)
    return -chosen * fixed(BATCH).to(x.dtype) / BATCH


def _ctc(model, x, reduction="mean"):
    scores = model(x).log_softmax(-1).transpose(0, 1)
    lengths, targets = torch.full((BATCH,), 7), WORDS[:, :2] + 1
    each = F.ctc_loss(scores, targets, lengths, torch.full((BATCH,), 2), reduction="none")
    return each.sum() / BATCH if reduction == "mean" else each / BATCH


def _shifted(model, x, reduction="mean"):
    scores, targets = model(x)[:, :-1].reshape(-1, 9), x[:, 1:].reshape(-1)
    each = F.cross_entropy(scores, targets, reduction=reduction)
    return each if reduction == "mean" else each.view(BATCH, -1).sum(1) / each.numel()


def _dice(x):
    p = x.sigmoid().flatten(1)
    return 1 - 2 * (p * 0.3).sum(1) / (p.sum(1) + 1)


CASES = {
    "cross entropy": Case(
        _cross_entropy, lambda m, x: _cross_entropy(m, x, reduction="none") / BATCH
    ),
    "label smoothing": Case(
        lambda m, x: _cross_entropy(m, x, label_smoothing=0.1),
        lambda m, x: _cross_entropy(m, x, label_smoothing=0.1, reduction="none") / BATCH,
    ),
    "class weights": Case(
        lambda m, x: _cross_entropy(m, x, weight=WEIGHTS),
        lambda m, x: _cross_entropy(m, x, weight=WEIGHTS, reduction="none") / WEIGHTS[LABELS].sum(),
    ),
    "ignored target": Case(
        lambda m, x: F.cross_entropy(m(x), IGNORED),
        lambda m, x: F.cross_entropy(m(x), IGNORED, reduction="none") / (BATCH - 1),
    ),
    "binary": Case(
        lambda m, x: F.binary_cross_entropy_with_logits(m(x), (x[:, :4] > 0).to(x.dtype)),
        lambda m, x: (
            F.binary_cross_entropy_with_logits(
                m(x), (x[:, :4] > 0).to(x.dtype), reduction="none"
            ).mean(1)
            / BATCH
        ),
    ),
    "divergence": Case(
        lambda m, x: F.kl_div(m(x).log_softmax(1), x[:, :4].softmax(1), reduction="batchmean"),
        lambda m, x: (
            F.kl_div(m(x).log_softmax(1), x[:, :4].softmax(1), reduction="none").sum(1) / BATCH
        ),
    ),
    "huber": Case(
        lambda m, x: F.smooth_l1_loss(m(x), x[:, :4]),
        lambda m, x: F.smooth_l1_loss(m(x), x[:, :4], reduction="none").mean(1) / BATCH,
    ),
    "autoencoder": Case(
        lambda m, x: _variational(m, x, reduced=True),
        lambda m, x: _variational(m, x, reduced=False),
        lambda: nn.ModuleList([nn.Linear(6, 8), nn.Linear(4, 6)]),
    ),
    "three forwards": Case(_triplet, lambda m, x: _triplet(m, x, "none") / BATCH),
    "contrastive": Case(_contrastive, lambda m, x: _contrastive(m, x, "none") / BATCH),
    "masked": Case(
        lambda m, x: ((m(x) - 1).square() * (x[:, :4] > 0)).sum() / 9,
        lambda m, x: ((m(x) - 1).square() * (x[:, :4] > 0)).sum(1) / 9,
    ),
    "some rows": Case(
        lambda m, x: (m(x) - 1)[x[:, 0] > 0].square().sum(),
        lambda m, x: (m(x) - 1).square().sum(1) * (x[:, 0] > 0),
    ),
    "two heads": Case(
        lambda m, x: _cross_entropy(m, x) + m(x).square().mean() / 2,
        lambda m, x: _cross_entropy(m, x, reduction="none") / BATCH + m(x).square().mean(1) / 16,
    ),
    "penalty on a bias as long as the batch": Case(
        lambda m, x: (m(x) - 1).square().mean() + 0.1 * m[2].bias.abs().sum(),
        lambda m, x: (m(x) - 1).square().mean(1) / BATCH,
        lambda: _mlp(8),
    ),
    "root": Case(*by_chain_rule(lambda output: (output - 1).square().mean().sqrt())),
    "norm": Case(*by_chain_rule(lambda output: (output - 1).norm())),
    "deviation over the batch": Case(
        *by_chain_rule(lambda output: F.relu(1 - output.std(0)).mean()), lambda: _mlp(8)
    ),
    "correlation of as many features": Case(
        *by_chain_rule(_cross_correlation, _standardized), lambda: _mlp(8)
    ),
    "gradient penalty": Case(
        lambda m, x: _gradient_penalty(m, x).mean(),
        lambda m, x: _gradient_penalty(m, x) / BATCH,
        lambda: _mlp(1),
    ),
    "policy": Case(lambda m, x: _policy(m, x).sum(), _policy),
    "sum in Python": Case(
        lambda m, x: sum((one - 1).square().sum() for one in m(x)),
        lambda m, x: (m(x) - 1).square().sum(1),
    ),
    "a forward for each": Case(
        lambda m, x: torch.stack([m(one[None]).square().sum() for one in x]).mean(),
        lambda m, x: m(x).square().sum(1) / BATCH,
    ),
    "language model": Case(
        _shifted, lambda m, x: _shifted(m, x, "none"), _language_model, lambda: WORDS
    ),
    "ctc": Case(_ctc, lambda m, x: _ctc(m, x, "none"), _language_model, lambda: WORDS),
    "pixels": Case(
        lambda m, x: F.mse_loss(m(x), x),
        lambda m, x: (m(x) - x).square().flatten(1).sum(1) / x.numel(),
        lambda: nn.Conv2d(2, 2, 3, padding=1),
        lambda: fixed(BATCH, 2, 4, 4),
    ),
    "dice": Case(
        lambda m, x: _dice(m(x)).mean(),
        lambda m, x: _dice(m(x)) / BATCH,
        lambda: nn.Conv2d(2, 1, 3, padding=1),
        lambda: fixed(BATCH, 2, 4, 4),
    ),
    "normalized features": Case(
        lambda m, x: (m(x) - 1).abs().mean(),
        lambda m, x: (m(x) - 1).abs().mean(1) / BATCH,
        lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)),
    ),
}


class WithLoss(nn.Module):
    def __init__(self, model, loss):
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, x):
        return self.loss(self.model, x)


@pytest.mark.parametrize("name", CASES)
def test_examples_of_a_loss(name):
    """The examples are those with the largest share by backwards of each row's loss, in float64."""
    case = CASES[name]
    torch.manual_seed(1)
    x = case.x()
    if x.is_floating_point():
        x[5] *= 3
        x = x.float()
    model = WithLoss(case.model(), case.loss)
    with Kernels() as kernels:
        loss = model(x)
        parameters = dict(model.named_parameters())
        found = largest_examples(
            LiveGraph([loss], [torch.ones(())], parameters, tuple(x.shape), kernels.batches)
        )
    double = float64.widen_module(copy.deepcopy(model.model))
    x = x.double() if x.is_floating_point() else x
    each = torch.stack([flat(row, double) for row in case.rows(double, x)])
    whole = flat(case.loss(double, x), double)
    shares = each @ whole / (whole @ whole)
    order = shares.sort(descending=True).indices[:MOST].tolist()
    assert [int(one.name) for one in found.shares] == order
    assert [one.share for one in found.shares] == pytest.approx(shares[order].tolist(), abs=1e-4)
    norms = each.norm(dim=1)[order].tolist()
    assert [one.norm for one in found.shares] == pytest.approx(norms, rel=1e-4)


def flat(loss, model):
    """The gradients of all parameters, one after another."""
    found = torch.autograd.grad(
        loss, list(model.parameters()), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return torch.cat([one.flatten() for one in found])

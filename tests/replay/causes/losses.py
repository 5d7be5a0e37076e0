"""Losses that people write themselves, outside of the model and in it."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.replay.causes.cause import Net, Training, batch, cause

LABELS = torch.tensor([0, 1, 2, 3])


@cause("log", phase="forward", examples=(2,), loop="operation")
def focal_loss_of_a_probability_of_zero():
    """A log, in the loss outside of the model, of a softmax that has underflowed."""

    def focal(logits):
        p = F.softmax(logits, dim=1)  # <- possible
        p = p.gather(1, labels[:, None]).squeeze(1)
        return (-((1 - p) ** 2) * p.log()).mean()  # <- born

    model, x = nn.Linear(4, 4), batch(2, 1e4)
    labels = model(x).argmin(1)
    return Training(model, x, loss=focal)


@cause("log", phase="forward", examples=(1,))
def cross_entropy_of_a_saturated_sigmoid():
    """A log of a sigmoid that is 0, in a loss that is a module."""

    class CrossEntropy(nn.Module):
        def forward(self, logits):
            p = torch.sigmoid(logits)  # <- possible
            return -torch.log(p).mean()  # <- born

    model = nn.Linear(4, 1)
    x = batch(1, -1e5 * model.weight.detach()[0])
    return Training(model, x, loss=CrossEntropy())


@cause("div", module="", phase="forward")
def mean_over_no_token():
    """A masked mean over nothing, of which only the loss is NaN: the gradients are finite."""

    def forward(self, *, ids, labels):
        each = F.cross_entropy(
            self.fc(self.embed(ids)).flatten(0, 1),
            labels.flatten(),
            ignore_index=-100,
            reduction="none",
        )
        return {"loss": each.sum() / (labels != -100).sum()}  # <- born

    ids = torch.randint(0, 9, (2, 3))
    return Training(
        Net(forward, embed=nn.Embedding(9, 4)),
        ids=ids,
        labels=torch.full_like(ids, -100),
        loss=lambda output: output["loss"],
    )


@cause("sqrt", module="", phase="backward", examples=(1,), loop="operation")
def distance_of_equal_embeddings():
    """A triplet loss: the gradient of a square root at 0."""

    def forward(self, anchor, positive, negative):
        a, p, n = self.fc(anchor), self.fc(positive), self.fc(negative)
        near = torch.sqrt((a - p).pow(2).sum(dim=1))  # <- born
        far = torch.sqrt((a - n).pow(2).sum(dim=1) + 1e-12)
        return F.relu(near - far + 10).mean()

    anchor, positive = torch.randn(4, 4), torch.randn(4, 4)
    positive[1] = anchor[1]
    return Training(Net(forward), anchor, positive, torch.randn(4, 4))


@cause("sqrt", phase="backward")
def root_of_the_error_of_a_perfect_fit():
    """A root of a mean squared error that is 0, of which the gradient is 0 times Inf."""

    def loss(output):
        return torch.sqrt(F.mse_loss(output, torch.zeros(4, 4)))  # <- born

    return Training(nn.Linear(4, 4, bias=False), torch.zeros(4, 4), loss=loss)


@cause("ctc_loss", module="", phase="forward", examples=(1,), loop="operation")
def target_longer_than_the_sound():
    """A CTC loss without any path, whose other result is memory that nobody has written."""

    def forward(self, x, sizes, targets, target_sizes):
        scores = self.fc(self.rnn(x)[0]).log_softmax(-1).transpose(0, 1)
        return F.ctc_loss(scores, targets, sizes, target_sizes)  # <- born

    return Training(
        Net(forward, rnn=nn.GRU(5, 4, batch_first=True)),
        torch.randn(3, 10, 5),
        torch.tensor([10, 4, 10]),
        torch.randint(1, 4, (3, 7)),
        torch.tensor([3, 7, 2]),
    )


@cause("log", module="", phase="forward", examples=(1,))
def log_beside_a_healthy_ctc_loss():
    """The unwritten memory of a CTC loss that has a path for every example is not looked at."""

    def forward(self, x, sizes, targets, target_sizes):
        output = self.fc(x)
        scores = output.log_softmax(-1).transpose(0, 1)
        loss = F.ctc_loss(scores, targets, sizes, target_sizes)
        return loss + torch.log(output.square().sum((1, 2))).mean()  # <- born

    return Training(
        Net(forward),
        batch(1, 0.0, 3, 10, 4),
        torch.tensor([10, 8, 10]),
        torch.randint(1, 4, (3, 3)),
        torch.tensor([3, 2, 2]),
    )


@cause("log", module="crf", phase="forward", examples=(1,))
def forward_algorithm_that_underflows():
    """Products of probabilities over the time steps become 0, and then a log is taken."""

    class RandomField(nn.Module):
        def __init__(self):
            super().__init__()
            self.transitions = nn.Parameter(torch.zeros(4, 4))

        def forward(self, emissions):
            alpha = emissions[:, 0]
            for step in range(1, emissions.shape[1]):
                alpha = (alpha @ self.transitions.exp()) * emissions[:, step]
            return -alpha.sum(1).log().mean()  # <- born

    def forward(self, x, offset):
        return self.crf(torch.sigmoid(self.fc(x) - offset[:, None, None]))

    offset = torch.tensor([1.0, 30.0, 1.0])
    return Training(Net(forward, crf=RandomField()), torch.randn(3, 12, 4), offset)


@cause("nll_loss", module="", phase="forward")
def all_targets_ignored():
    """A cross entropy over no target, weighted by a learned number."""

    def forward(self, x, labels):
        first = F.cross_entropy(self.fc(x), labels, ignore_index=-100)  # <- born
        return first * self.weight.weight.sum() + self.fc(x).square().mean()

    labels = torch.full((4,), -100)
    return Training(Net(forward, weight=nn.Linear(1, 1)), torch.randn(4, 4), labels)


@cause("log", phase="forward", examples=(3,))
def log_of_a_negative_target():
    """A NaN, and no Inf: the log of a negative number."""

    def loss(output):
        return F.smooth_l1_loss(output, torch.log(target))  # <- born

    target = batch(3, -0.5, 4, 2, draw=torch.rand)
    return Training(nn.Linear(4, 2), torch.randn(4, 4), loss=loss)

"""A second set of healthy trainings for report_accuracy.py, made after the rules were."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from _report_models import CLASSES, Batch, Gpt, Lstm, cnn, images, mlp, sentences, vectors
from _report_runs import HALF, MOMENTUM, Adam, AdamW, Sgd, rate, train, train_managed
from gradwatch import History


def _again(draw: Callable[[], Batch], count: int = 4) -> Callable[[], Batch]:
    """Draws the same few batches again and again, to be learnt by heart."""
    batches = cycle([draw() for _ in range(count)])
    return lambda: next(batches)


def _zero_head() -> nn.Module:
    model = mlp(4)
    for parameter in model[-1].parameters():
        nn.init.zeros_(parameter)
    return model


def _deep_kaiming() -> nn.Module:
    model = mlp(20)
    for layer in model[::2]:
        nn.init.kaiming_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def _layer_norm() -> nn.Module:
    block = [layer for _ in range(2) for layer in (nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU())]
    return nn.Sequential(nn.Linear(32, 64), *block, nn.Linear(64, CLASSES))


class Experts(nn.Module):
    """Sends each example to one of eight networks."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(32, 8), nn.ModuleList(mlp() for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        """Weighs the answer of the chosen one by its share."""
        share, chosen = self.gate(x).softmax(-1).max(-1)
        out = x.new_zeros(len(x), CLASSES)
        for index in chosen.unique().tolist():
            rows = (chosen == index).nonzero()[:, 0]
            out = out.index_add(0, rows, self.experts[index](x[rows]) * share[rows, None])
        return out


def _to_zero() -> History:
    def draw() -> Batch:
        return torch.randn(32, 32), torch.zeros(32, CLASSES)

    model = mlp(act=nn.Tanh)
    return train(model, draw, rate(Adam, 1e-3), loss_of=F.mse_loss, steps=800)


def _summed(x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(x, y, reduction="sum")


MORE: dict[str, Callable[[], History]] = {
    "LSTM, SGD with momentum": lambda: train(Lstm(), sentences(), rate(Sgd, 1.0, **MOMENTUM)),
    "MLP learns 4 batches by heart, 1,500 steps": lambda: train(
        mlp(), _again(vectors()), rate(Adam, 1e-3), steps=1500
    ),
    "CNN learns 4 batches by heart": lambda: train(
        cnn(), _again(images()), rate(Sgd, 0.02, **MOMENTUM), steps=400
    ),
    "head that begins at zero, Adam": lambda: train(_zero_head(), vectors(), rate(Adam, 1e-3)),
    "head that begins at zero, SGD": lambda: train(_zero_head(), vectors(), rate(Sgd, 0.1)),
    "mixture of eight experts": lambda: train(Experts(), vectors(), rate(Adam, 1e-3)),
    "ReLU, 20 layers, He initialisation": lambda: train(
        _deep_kaiming(), vectors(), rate(Adam, 3e-4)
    ),
    "ReLU, 8 layers": lambda: train(mlp(8), vectors(), rate(Adam, 1e-3)),
    "ReLU, 14 layers": lambda: train(mlp(14), vectors(), rate(Adam, 1e-3)),
    "LayerNorm, SGD 0.1": lambda: train(_layer_norm(), vectors(), rate(Sgd, 0.1, **MOMENTUM)),
    "batches of one": lambda: train(mlp(), vectors(1), rate(Sgd, 0.01), steps=600),
    "batches of four": lambda: train(
        mlp(act=nn.LeakyReLU), vectors(4), rate(Adam, 1e-3), steps=600
    ),
    "sigmoid, 3 layers": lambda: train(mlp(3, act=nn.Sigmoid), vectors(), rate(Adam, 1e-2)),
    "sigmoid, 5 layers": lambda: train(mlp(5, act=nn.Sigmoid), vectors(), rate(Adam, 1e-3)),
    "GPT, 800 steps, clip=1.0, cosine to 0": lambda: train(
        Gpt(), sentences(), rate(AdamW, 1e-3), steps=800, clip=1.0, warm_up=50, decay=True
    ),
    "GPT, rate 1e-5": lambda: train(Gpt(), sentences(), rate(AdamW, 1e-5)),
    "GPT, float16 autocast with GradScaler": lambda: train(
        Gpt(),
        sentences(),
        rate(AdamW, 1e-3),
        steps=100,
        dtype=HALF,
        scaler=torch.amp.GradScaler("cpu"),
    ),
    "8 micro-batches, noise scale": lambda: train_managed(mlp(), vectors(4), rate(Sgd, 0.05), 8),
    "regression to zero, 800 steps": _to_zero,
    "AdamW 0.01, warm-up of 100 steps": lambda: train(
        mlp(), vectors(), rate(AdamW, 1e-2), warm_up=100
    ),
    "CNN, RMSprop": lambda: train(cnn(), images(), rate(torch.optim.RMSprop, 1e-3)),
    "loss summed over the batch": lambda: train(mlp(), vectors(), rate(Sgd, 1e-3), loss_of=_summed),
}

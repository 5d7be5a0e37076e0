"""Small trainings: two sets of healthy ones, and ones made sick on purpose."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradwatch
from benchmarks.report.models import (
    CLASSES,
    Batch,
    Gpt,
    Lstm,
    cnn,
    images,
    mlp,
    resnet,
    sentences,
    vectors,
)
from gradwatch import History

STEPS = 200
STATISTICS: dict[str, Any] = {"statistics": ("update_ratio", "zeros"), "every": 10}
Sgd = torch.optim.SGD
Adam = torch.optim.Adam
AdamW = torch.optim.AdamW


def train(
    model: nn.Module,
    draw: Callable[[], Batch],
    make: Callable[..., torch.optim.Optimizer],
    *,
    steps: int = STEPS,
    warm_up: int = 0,
    decay: bool = False,
    zero_grad: bool = True,
    spoil: Callable[[int, Batch], Batch] = lambda step, batch: batch,
    loss_of: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    dtype: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    **options: Any,
) -> History:
    """Trains in a plain loop under gradwatch, and returns the history."""
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: (
            min(1.0, (i + 1) / (warm_up + 1))
            * (0.5 + 0.5 * torch.tensor(torch.pi * i / steps).cos().item() if decay else 1.0)
        ),
    )
    with gradwatch.watch(model, optimizer, **STATISTICS, **options) as watcher:
        for step in range(1, steps + 1):
            x, y = spoil(step, draw())
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                loss = loss_of(model(x), y)
            if scaler is None:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            if zero_grad:
                optimizer.zero_grad()
            rate.step()
    return watcher.history


def train_managed(
    model: nn.Module,
    draw: Callable[[], Batch],
    make: Callable[..., torch.optim.Optimizer],
    micro_batches: int = 1,
    steps: int = STEPS,
    **options: Any,
) -> History:
    """Trains in gradwatch's managed loop, which records losses and noise scale."""
    optimizer = make(model.parameters())
    with gradwatch.watch(
        model, optimizer, accumulate=micro_batches, **STATISTICS, **options
    ) as watcher:
        for _ in range(steps * micro_batches):
            x, y = draw()
            watcher.backward(F.cross_entropy(model(x), y), weight=len(x))
            watcher.step()
    return watcher.history


def gan() -> History:
    """Trains a generator and a discriminator alternately."""
    generator = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32))
    discriminator = nn.Sequential(nn.Linear(32, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
    both = nn.ModuleDict({"generator": generator, "discriminator": discriminator})
    first = Adam(generator.parameters(), 1e-3, betas=(0.5, 0.99))
    second = Adam(discriminator.parameters(), 1e-3, betas=(0.5, 0.99))
    draw = vectors()
    with gradwatch.watch(both, [first, second], **STATISTICS) as watcher:
        for _ in range(STEPS):
            fake = generator(torch.randn(32, 8))
            second.zero_grad()
            real = F.softplus(-discriminator(draw()[0])).mean()
            (real + F.softplus(discriminator(fake.detach())).mean()).backward()
            second.step()
            first.zero_grad()
            F.softplus(-discriminator(fake)).mean().backward()
            first.step()
    return watcher.history


def transfer() -> History:
    """Trains the head and the last block of an otherwise frozen network."""
    model = resnet()
    for p in [*model[0].parameters(), *(p for b in model[1:5] for p in b.parameters())]:
        p.requires_grad_(False)
    return train(model, images(), rate(AdamW, 1e-3))


def rate(kind: Callable[..., Any], lr: float, **settings: Any) -> Callable[..., Any]:
    """Returns a function that makes an optimizer of a class with a learning rate."""
    return lambda parameters: kind(parameters, lr=lr, **settings)


def regression() -> History:
    """Trains on a smooth function, with the squared error."""

    def draw() -> Batch:
        x = torch.randn(64, 32)
        return x, torch.stack([x[:, i].sin() for i in range(CLASSES)], 1)

    return train(mlp(4, act=nn.GELU), draw, rate(Adam, 1e-3), loss_of=F.mse_loss)


def _scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu")


HALF, BRAIN = torch.float16, torch.bfloat16
MOMENTUM = {"momentum": 0.9}


def two_ranks(factor: float = 1.0) -> History:
    """Trains with DistributedDataParallel; the loss of the second rank is multiplied."""
    with tempfile.TemporaryDirectory() as folder:
        seed = torch.initial_seed()
        context = torch.multiprocessing.get_context("spawn")
        other = context.Process(target=_rank, args=(1, seed, folder, factor))
        other.start()
        history = _rank(0, seed, folder, factor)
        other.join()
    return history


def _rank(number: int, seed: int, folder: str, factor: float) -> History:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/ranks", rank=number, world_size=2
    )
    draw, model = vectors(), nn.parallel.DistributedDataParallel(mlp())
    torch.manual_seed(seed + number)
    scale = factor if number else 1.0
    history = train(
        model, draw, rate(Sgd, 0.01), loss_of=lambda x, y: scale * F.cross_entropy(x, y), steps=100
    )
    torch.distributed.destroy_process_group()
    return history


HEALTHY: dict[str, Callable[[], History]] = {
    "MLP, SGD with momentum": lambda: train(mlp(), vectors(), rate(Sgd, 0.05, **MOMENTUM)),
    "MLP with dropout, AdamW, warm-up, cosine to 0": lambda: train(
        mlp(4, drop=0.2), vectors(), rate(AdamW, 3e-3), warm_up=20, decay=True
    ),
    "CNN with BatchNorm, SGD": lambda: train(cnn(), images(), rate(Sgd, 0.05, **MOMENTUM)),
    "ResNet, SGD, cosine to 0": lambda: train(
        resnet(), images(), rate(Sgd, 0.05, weight_decay=5e-4, **MOMENTUM), decay=True
    ),
    "LSTM, Adam, clip=1.0": lambda: train(Lstm(), sentences(), rate(Adam, 1e-2), clip=1.0),
    'GPT, AdamW, warm-up, clip="auto"': lambda: train(
        Gpt(), sentences(), rate(AdamW, 2e-3), warm_up=20, clip="auto"
    ),
    "MLP, Adam, 4 micro-batches": lambda: train_managed(mlp(), vectors(8), rate(Adam, 1e-3), 4),
    "transfer: head and last block, the rest frozen": transfer,
    "tanh, 10 layers, Adam": lambda: train(mlp(10, act=nn.Tanh), vectors(), rate(Adam, 1e-3)),
    "MLP, float16 autocast with GradScaler": lambda: train(
        mlp(), vectors(), rate(AdamW, 1e-3), dtype=HALF, scaler=_scaler()
    ),
    "GPT, bfloat16 autocast, Adam": lambda: train(
        Gpt(), sentences(), rate(Adam, 1e-3), steps=100, dtype=BRAIN
    ),
    "GAN, two Adam": gan,
    "regression, GELU, Adam": regression,
    "MLP on two ranks": two_ranks,
}


def _again(draw: Callable[[], Batch], count: int = 4) -> Callable[[], Batch]:
    """Draws the same few batches again and again, for the model to memorize."""
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
    """A mixture of eight experts that sends each example to one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(32, 8), nn.ModuleList(mlp() for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        """Weights the output of the chosen expert by its probability."""
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


MORE_HEALTHY: dict[str, Callable[[], History]] = {
    "LSTM, SGD with momentum": lambda: train(Lstm(), sentences(), rate(Sgd, 1.0, **MOMENTUM)),
    "MLP memorizes 4 batches, 1,500 steps": lambda: train(
        mlp(), _again(vectors()), rate(Adam, 1e-3), steps=1500
    ),
    "CNN memorizes 4 batches": lambda: train(
        cnn(), _again(images()), rate(Sgd, 0.02, **MOMENTUM), steps=400
    ),
    "head that starts at zero, Adam": lambda: train(_zero_head(), vectors(), rate(Adam, 1e-3)),
    "head that starts at zero, SGD": lambda: train(_zero_head(), vectors(), rate(Sgd, 0.1)),
    "mixture of eight experts": lambda: train(Experts(), vectors(), rate(Adam, 1e-3)),
    "ReLU, 20 layers, He initialization": lambda: train(
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
        scaler=_scaler(),
    ),
    "8 micro-batches, noise scale": lambda: train_managed(mlp(), vectors(4), rate(Sgd, 0.05), 8),
    "regression to zero, 800 steps": _to_zero,
    "AdamW 0.01, warm-up of 100 steps": lambda: train(
        mlp(), vectors(), rate(AdamW, 1e-2), warm_up=100
    ),
    "CNN, RMSprop": lambda: train(cnn(), images(), rate(torch.optim.RMSprop, 1e-3)),
    "loss summed over the batch": lambda: train(mlp(), vectors(), rate(Sgd, 1e-3), loss_of=_summed),
}
"""The second set, chosen after the rules were written."""


class Detached(nn.Module):
    """A network with a branch that the loss depends on but no gradient reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.branch, self.head = mlp(), mlp(), nn.Linear(2 * CLASSES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Uses both branches, one of them detached."""
        out: Tensor = self.head(torch.cat([self.trunk(x), self.branch(x).detach()], 1))
        return out


class WrongReLU(torch.autograd.Function):
    """A ReLU whose gradient has the wrong sign."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Computes the ReLU, correctly."""
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Returns the gradient with the wrong sign."""
        (x,) = ctx.saved_tensors
        return -gradient * (x > 0)


class Wrong(nn.Module):
    """An activation module with the wrong gradient."""

    def forward(self, x: Tensor) -> Tensor:
        """Applies :class:`WrongReLU`."""
        out: Tensor = WrongReLU.apply(x)
        return out


def dead(bias: float = -30.0, units: int = 64) -> nn.Module:
    """Builds a network with units that are off for every input."""
    model = mlp(4)
    with torch.no_grad():
        model[2].bias[:units] = bias
    return model


def _nan_at(bad: int) -> Callable[[int, Batch], Batch]:
    return lambda step, batch: (batch[0] * (torch.nan if step == bad else 1.0), batch[1])


def _loud_at(steps: Iterable[int], factor: float) -> Callable[[int, Batch], Batch]:
    loud = set(steps)
    return lambda step, batch: (batch[0] * (factor if step in loud else 1.0), batch[1])


def half_weights() -> History:
    """Trains float16 weights with a small loss and no scaler."""
    model = mlp(5).half()
    return train(
        model,
        vectors(128),
        rate(Sgd, 0.05, **MOMENTUM),
        spoil=lambda step, batch: (batch[0].half(), batch[1]),
        loss_of=lambda x, y: F.cross_entropy(x.float(), y) * 1e-3,
    )


def collapse() -> History:
    """Trains with a ``GradScaler`` and a NaN in every batch."""
    return train(
        mlp(),
        vectors(),
        rate(Sgd, 0.05),
        spoil=lambda step, batch: (batch[0] * torch.nan, batch[1]),
        dtype=HALF,
        scaler=_scaler(),
        steps=100,
    )


SICK: dict[str, tuple[Callable[[], History], set[str]]] = {
    "rate x 100, MLP, SGD": (
        lambda: train(mlp(), vectors(), rate(Sgd, 5.0, **MOMENTUM)),
        {"exploding", "nan"},
    ),
    "rate x 100, GPT, AdamW": (
        lambda: train(Gpt(), sentences(), rate(AdamW, 0.2), steps=100),
        {"exploding", "unstable_start", "update_large"},
    ),
    "rate x 100, MLP, Adam, losses seen": (
        lambda: train_managed(mlp(4), vectors(), rate(Adam, 0.1)),
        {"exploding", "unstable_start", "update_large"},
    ),
    "sigmoid stack, 30 deep": (
        lambda: train(mlp(30, 32, nn.Sigmoid), vectors(), rate(Adam, 1e-3)),
        {"vanishing"},
    ),
    "dead ReLU": (lambda: train(dead(), vectors(), rate(Adam, 1e-3)), {"zero_gradient"}),
    "three units in four dead": (
        lambda: train(dead(units=48), vectors(), rate(Adam, 1e-3)),
        {"dead_units"},
    ),
    "detached branch": (
        lambda: train(Detached(), vectors(), rate(Adam, 1e-3)),
        {"no_gradient"},
    ),
    "forgotten zero_grad, SGD": (
        lambda: train(mlp(), vectors(), rate(Sgd, 0.05), zero_grad=False),
        {"accumulating"},
    ),
    "forgotten zero_grad, GPT, Adam": (
        lambda: train(Gpt(), sentences(), rate(Adam, 1e-3), zero_grad=False, steps=100),
        {"accumulating"},
    ),
    "wrong custom gradient": (
        lambda: train_managed(mlp(4, act=Wrong), vectors(), rate(Sgd, 0.05, **MOMENTUM)),
        {"loss_rising", "exploding"},
    ),
    "the same, losses not seen": (
        lambda: train(mlp(4, act=Wrong), vectors(), rate(Sgd, 0.05, **MOMENTUM)),
        {"exploding", "update_large", "spike"},
    ),
    "one NaN batch, recorded": (
        lambda: train(mlp(), vectors(), rate(Adam, 1e-3), spoil=_nan_at(120)),
        {"nan"},
    ),
    "one NaN batch, skipped": (
        lambda: train(mlp(), vectors(), rate(Adam, 1e-3), spoil=_nan_at(120), on_nonfinite="skip"),
        {"nan"},
    ),
    "float16 weights, no scaler": (half_weights, {"half_precision"}),
    "float16 autocast, no scaler": (
        lambda: train(
            mlp(5),
            vectors(128),
            rate(Adam, 1e-3),
            dtype=HALF,
            loss_of=lambda x, y: F.cross_entropy(x, y) * 1e-3,
        ),
        {"half_precision"},
    ),
    "loss scale collapses": (collapse, {"loss_scale"}),
    "updates too small": (
        lambda: train(mlp(), vectors(), rate(Adam, 1e-9)),
        {"update_small"},
    ),
    "three loud batches": (
        lambda: train(mlp(), vectors(), rate(Sgd, 0.01), spoil=_loud_at((80, 120, 160), 50.0)),
        {"spike"},
    ),
    "one of two ranks with 20 times the loss": (lambda: two_ranks(20.0), {"rank"}),
    "clip far too tight": (
        lambda: train(mlp(), vectors(), rate(Adam, 1e-3), clip=0.01),
        {"clip_always"},
    ),
}

"""The models that are trained: small enough for two cores, and with different bottlenecks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LossOf = Callable[[], Tensor]
NARROW_ELEMENTS = 16


@dataclass(frozen=True)
class Workload:
    """A model to train.

    Attributes:
        title: Name in the tables.
        build: Makes the model on a device, and a function that returns its loss on a fixed batch.
        weight: Its share of the benchmark's time, relative to the other workloads.
    """

    title: str
    build: Callable[[str], tuple[nn.Module, LossOf]]
    weight: float = 1.0


def build_gpt(device: str) -> tuple[nn.Module, LossOf]:
    """Makes a transformer of 10 million parameters and its loss on 2 x 48 tokens."""
    width, vocabulary, batch, length = 384, 128, 2, 48
    layer = nn.TransformerEncoderLayer(
        width, 6, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    embedding = nn.Embedding(vocabulary, width)
    blocks = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
    head = nn.Linear(width, vocabulary)
    model = nn.ModuleDict({"embedding": embedding, "blocks": blocks, "head": head}).to(device)
    tokens = torch.randint(vocabulary, (batch, length + 1)).to(device)
    mask = nn.Transformer.generate_square_subsequent_mask(length).to(device)

    def loss_of() -> Tensor:
        hidden = blocks(embedding(tokens[:, :-1]), mask=mask, is_causal=True)
        return F.cross_entropy(head(hidden).flatten(0, 1), tokens[:, 1:].flatten())

    return model, loss_of


def build_mlp(device: str) -> tuple[nn.Module, LossOf]:
    """Makes 150 narrow linear layers, 300 tensors, and their loss on 64 rows."""
    width, rows = 64, 64
    layers = nn.ModuleList([nn.Linear(width, width) for _ in range(150)]).to(device)
    inputs, targets = torch.randn(2, rows, width).to(device)

    def loss_of() -> Tensor:
        x = inputs
        for layer in layers:
            # Residual connections keep the gradient from vanishing over so many layers.
            x = x + torch.tanh(layer(x))
        return F.mse_loss(x, targets)

    return layers, loss_of


class _Block(nn.Module):
    """Two convolutions with batch normalization, and a residual connection around them."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(width) for _ in range(2)])
        short = nn.Conv2d(inputs, width, 1, stride, bias=False)
        self.short = short if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Adds the output of the convolutions to the input."""
        found = self.norms[1](self.second(F.relu(self.norms[0](self.first(x)))))
        return F.relu(found + self.short(x))


def build_cnn(device: str) -> tuple[nn.Module, LossOf]:
    """Makes a residual network of 17 convolutions and its loss on 8 images of 16 x 16."""
    widths = (32, 64, 128, 256)
    blocks = [
        _Block(inputs, width, stride)
        for before, width in zip((32, *widths), widths, strict=False)
        for inputs, stride in ((before, 1 if width == before else 2), (width, 1))
    ]
    stem = nn.Conv2d(3, 32, 3, padding=1, bias=False)
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10)]
    model = nn.Sequential(stem, nn.BatchNorm2d(32), nn.ReLU(), *blocks, *pool).to(device)
    images, labels = torch.randn(8, 3, 16, 16).to(device), torch.randint(10, (8,)).to(device)
    return model, lambda: F.cross_entropy(model(images), labels)


def build_lstm(device: str) -> tuple[nn.Module, LossOf]:
    """Makes a two-layer LSTM of 4 million parameters and its loss on 8 x 16 tokens."""
    words, width, vocabulary = 256, 512, 1000
    embedding = nn.Embedding(vocabulary, words)
    lstm = nn.LSTM(words, width, num_layers=2, batch_first=True)
    head = nn.Linear(width, vocabulary)
    model = nn.ModuleDict({"embedding": embedding, "lstm": lstm, "head": head}).to(device)
    tokens = torch.randint(vocabulary, (8, 17)).to(device)

    def loss_of() -> Tensor:
        hidden, _ = lstm(embedding(tokens[:, :-1]))
        return F.cross_entropy(head(hidden).flatten(0, 1), tokens[:, 1:].flatten())

    return model, loss_of


WORKLOADS = {
    "gpt": Workload("GPT, 10 million parameters", build_gpt, 5.0),
    "mlp": Workload("MLP, 300 narrow tensors", build_mlp, 3.0),
    "cnn": Workload("CNN, residual", build_cnn, 2.0),
    "lstm": Workload("LSTM, two layers", build_lstm, 2.0),
}


@dataclass(frozen=True)
class Setting:
    """One table of the benchmark.

    Attributes:
        workload: A key of ``WORKLOADS``.
        fused: Whether AdamW uses its fused kernel.
        accumulate: Micro-batches per step.
    """

    workload: str
    fused: bool = False
    accumulate: int = 1

    @property
    def title(self) -> str:
        """Title of the table."""
        batches = f"{self.accumulate} micro-batches" if self.accumulate > 1 else "one micro-batch"
        kind = "fused" if self.fused else "unfused"
        return f"{WORKLOADS[self.workload].title}; AdamW {kind}; {batches} a step"


class Training:
    """One model and its optimizer, which all variants train in turn.

    Not a copy for each variant: where a copy lies in memory changes the time of its steps by as
    much as what is measured here.
    """

    def __init__(
        self, model: nn.Module, loss_of: LossOf, *, fused: bool = False, accumulate: int = 1
    ) -> None:
        """Makes the optimizer, AdamW, fused or not."""
        self.model, self.loss_of, self.accumulate = model, loss_of, accumulate
        self.parameters = list(model.parameters())
        # A learning rate so small that the gradients stay the same from the first step to the last.
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-7, fused=fused)

    @classmethod
    def of(cls, setting: Setting, device: str) -> Training:
        """Builds the training of a setting, always with the same weights and data."""
        torch.manual_seed(0)
        model, loss_of = WORKLOADS[setting.workload].build(device)
        return cls(model, loss_of, fused=setting.fused, accumulate=setting.accumulate)

    def step(self, between: Callable[[], object] | None = None) -> None:
        """Runs one step of the bare loop.

        Args:
            between: Called between the last backward and the optimizer step.
        """
        for _ in range(self.accumulate):
            (self.loss_of() / self.accumulate).backward()
        if between is not None:
            between()
        self.optimizer.step()
        self.optimizer.zero_grad()


def narrow_training(tensors: int) -> Training:
    """Makes a training of many tensors of 16 elements each, with a cheap loss."""
    torch.manual_seed(0)
    model = nn.ParameterList([torch.randn(NARROW_ELEMENTS) for _ in range(tensors)])
    parameters = list(model)

    def loss_of() -> Tensor:
        return torch.cat(parameters).square().mean()

    training = Training(model, loss_of)
    training.optimizer = torch.optim.SGD(parameters, lr=1e-7, foreach=True)
    return training

"""The models, batches and optimizers that the contract suites train."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A model with the data that trains it: `batch(i)` is deterministic, `loss(model, batch)` a scalar."""

    model: nn.Module
    batch: Callable[[int], tuple[Tensor, ...]]
    loss: Callable[[nn.Module, tuple[Tensor, ...]], Tensor]


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _regression(
    inputs: Callable[[int], Tensor], outputs: int
) -> Callable[[int], tuple[Tensor, ...]]:
    def batch(index: int) -> tuple[Tensor, ...]:
        x = inputs(index)
        return x, torch.randn(x.shape[0], outputs, generator=_seeded(10_000 + index))

    return batch


def _squared_error(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    x, y = batch
    prediction = model(x)
    return (prediction - y.to(prediction.dtype)).pow(2).mean()


def _to_vocabulary(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    tokens, targets = batch
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


def _tokens(index: int) -> tuple[Tensor, ...]:
    both = torch.randint(0, 11, (4, 7), generator=_seeded(index))
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def _dense(index: int) -> Tensor:
    return torch.randn(8, 6, generator=_seeded(index))


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(3, 5, num_layers=2, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class _TiedTransformer(nn.Module):
    """A causal transformer whose output projection is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = torch.full((length, length), -math.inf, dtype=self.embedding.weight.dtype).triu(1)
        return self.head(self.encoder(self.embedding(tokens), mask=mask))


class _Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.spectrum = nn.Parameter(torch.randn(4, dtype=torch.complex64))
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        wave = torch.fft.fft(x[:, :4] * self.scale) * self.spectrum
        return torch.fft.ifft(wave).abs()


class _Mixed(nn.Module):
    """float32 parameters around a bfloat16 core."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 12)
        self.core = nn.Linear(12, 12).bfloat16()
        self.leave = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.enter(x)).to(self.core.weight.dtype)
        return self.leave(torch.tanh(self.core(hidden)).to(self.leave.weight.dtype))


class SparseBag(nn.Module):
    """An embedding with sparse gradients, alone (SparseAdam) or under a dense head (SGD)."""

    def __init__(self, *, head: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 4, sparse=True)
        self.head = nn.Linear(4, 11) if head else nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens))


def mlp(seed: int = 0) -> Case:
    """Return a multi-layer perceptron, in float32."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )
    return Case(model, _regression(_dense, 3), _squared_error)


def dropout_mlp(seed: int = 0) -> Case:
    """Return a perceptron whose dropout draws from the global generator."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 3))
    return Case(model, _regression(_dense, 3), _squared_error)


def cnn(seed: int = 0) -> Case:
    """Return a convolutional net with batch normalization."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2),
        nn.ReLU(), nn.Flatten(), nn.Linear(36, 3),
    )  # fmt: skip
    images = _regression(lambda index: torch.randn(6, 1, 8, 8, generator=_seeded(index)), 3)
    return Case(model, images, _squared_error)


def lstm(seed: int = 0) -> Case:
    """Return a two-layer LSTM with a linear head."""
    torch.manual_seed(seed)
    series = _regression(lambda index: torch.randn(5, 4, 3, generator=_seeded(index)), 2)
    return Case(_Recurrent(), series, _squared_error)


def transformer(seed: int = 0) -> Case:
    """Return a transformer with tied input and output embeddings."""
    torch.manual_seed(seed)
    return Case(_TiedTransformer(), _tokens, _to_vocabulary)


def sparse(seed: int = 0) -> Case:
    """Return a sparse embedding under a dense head, the same row drawn several times."""
    torch.manual_seed(seed)
    return Case(SparseBag(head=True), _tokens, _to_vocabulary)


def sparse_only(seed: int = 0) -> Case:
    """Return a sparse embedding and nothing else (for SparseAdam)."""
    torch.manual_seed(seed)
    return Case(
        SparseBag(head=False), _tokens, lambda model, batch: (model(batch[0]) - 1.0).pow(2).sum()
    )


def complex_numbers(seed: int = 0) -> Case:
    """Return a net with a complex64 and a float32 parameter."""
    torch.manual_seed(seed)
    return Case(_Complex(), _regression(_dense, 4), _squared_error)


def mixed(seed: int = 0) -> Case:
    """Return a net with float32 and bfloat16 parameters."""
    torch.manual_seed(seed)
    return Case(_Mixed(), _regression(_dense, 3), _squared_error)


def double(seed: int = 0) -> Case:
    """Return the perceptron in float64."""
    case = mlp(seed)
    return Case(case.model.double(), lambda i: tuple(t.double() for t in case.batch(i)), case.loss)


def _adafactor(parameters: Any) -> torch.optim.Optimizer:
    if not hasattr(torch.optim, "Adafactor"):
        pytest.skip("torch.optim.Adafactor needs torch 2.5 or newer")
    return torch.optim.Adafactor(parameters, lr=0.01)


Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD_momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "SGD_nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "SGD_foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "SGD_fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "Adam_amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, maximize=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "AdamW_foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "AdamW_fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "Adagrad_fused": lambda p: torch.optim.Adagrad(p, lr=0.01, fused=True),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "Adafactor": _adafactor,
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01),
}
CLOSURES: dict[str, Make] = {
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4, history_size=3),
    "LBFGS_strong_wolfe": lambda p: torch.optim.LBFGS(p, max_iter=5, line_search_fn="strong_wolfe"),
    "SGD_closure": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW_closure": lambda p: torch.optim.AdamW(p, lr=0.01),
}

"""The models that the suites train, and the data that trains them.

Models whose gradient is known beforehand, that run out of memory, or of which ranks use different
parts, are made for one suite and stay with it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

SEED = 20_011

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """A model with its data: `batch(i)` is the same whenever asked for, `loss` a mean over it."""

    model: nn.Module
    batch: Callable[[int], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]


class Recurrent(nn.Module):
    """A two-layer LSTM under a linear head."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.cell = nn.LSTM(6, 5, num_layers=2, batch_first=True, dropout=dropout)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x.unflatten(0, (-1, 2)))[0].flatten(0, 1))


class TiedTransformer(nn.Module):
    """A causal transformer whose output projection is its embedding."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.block = nn.TransformerEncoderLayer(
            8, 2, 16, dropout=dropout, batch_first=True, norm_first=True
        )
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        mask = hidden.new_full(2 * tokens.shape[1:], -math.inf).triu(1)
        return self.head(self.block(hidden, src_mask=mask))


class Checkpointed(nn.Module):
    """Two blocks whose activations are computed again in the backward."""

    def __init__(self, dropout: float, reentrant: bool) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(dropout)) for _ in range(2)
        )
        self.leave = nn.Linear(8, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.leave(x)


class PartlyFrozen(nn.Module):
    """A trained head on frozen features, beside a layer that the forward never uses."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.features = nn.Linear(6, 8).requires_grad_(False)
        self.middle = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(torch.tanh(self.middle(self.features(x)))))


class Bag(nn.Module):
    """An embedding with sparse gradients, under a dense head or alone."""

    def __init__(self, head: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 11 if not head else 4, sparse=True)
        self.head = nn.Linear(4, 11) if head else nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens))


class Spectral(nn.Module):
    """A filter with complex weights between real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6))
        self.spectrum = nn.Parameter(torch.randn(6, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.ifft(torch.fft.fft(x * self.scale) * self.spectrum).abs()[:, :3]


class Mixed(nn.Module):
    """A bfloat16 core between float32 layers."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 12)
        self.core = nn.Linear(12, 12).bfloat16()
        self.leave = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.enter(x)).to(self.core.weight.dtype)
        return self.leave(torch.tanh(self.core(hidden)).to(self.leave.weight.dtype))


def _mlp(dropout: float) -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16), nn.Sequential(nn.Tanh(), nn.Dropout(dropout)), nn.Linear(16, 8),
        nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip


def _cnn(dropout: float) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 2), nn.Flatten(), nn.Dropout(dropout), nn.Linear(8, 3),
    )  # fmt: skip


ON_NUMBERS: dict[str, Callable[[float], nn.Module]] = {
    "mlp": _mlp,
    "cnn": _cnn,
    "lstm": Recurrent,
    "checkpoint": lambda dropout: Checkpointed(dropout, reentrant=False),
    "reentrant": lambda dropout: Checkpointed(dropout, reentrant=True),
    "frozen": PartlyFrozen,
    "complex": lambda _: Spectral(),
}
ON_TOKENS: dict[str, Callable[[float], nn.Module]] = {
    "transformer": TiedTransformer,
    "sparse": lambda _: Bag(head=True),
    "all_sparse": lambda _: Bag(head=False),
}
MODELS = {**ON_NUMBERS, **ON_TOKENS}
IN_TWO_DTYPES: dict[str, Callable[[float], nn.Module]] = {"mixed": lambda _: Mixed()}


def make_case(name: str, *, rank: int = 0, dropout: float = 0.0) -> Case:
    """Return a model, the same on every rank, and the data of one rank."""
    torch.manual_seed(SEED)
    loss = _cross_entropy if name in ON_TOKENS else _squared_error
    return Case({**MODELS, **IN_TWO_DTYPES}[name](dropout), partial(make_batch, name, rank), loss)


def small(seed: int = 0) -> nn.Sequential:
    """Return two layers between four inputs and one output, for tests about anything but the model."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def small_sharded() -> nn.Sequential:
    """Return the same two layers, sharded by FSDP2 over all ranks."""
    from torch.distributed.fsdp import fully_shard

    model = small()
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    return model


def mlp() -> Case:
    """Return the perceptron: layers 0, 2 and 4 have weights."""
    return make_case("mlp")


def cnn() -> Case:
    """Return the convolutional net with batch normalization."""
    return make_case("cnn")


def lstm() -> Case:
    """Return the two-layer LSTM."""
    return make_case("lstm")


def transformer() -> Case:
    """Return the transformer with tied embeddings."""
    return make_case("transformer")


def sparse() -> Case:
    """Return the sparse embedding under a dense head; a batch draws some rows several times."""
    return make_case("sparse")


def sparse_only() -> Case:
    """Return a sparse embedding and nothing else."""
    return make_case("all_sparse")


def make_batch(name: str, rank: int, index: int) -> Batch:
    """Return a batch of what a model is trained on."""
    generator = torch.Generator().manual_seed(SEED + 1_000_000 * (rank + 1) + index)
    return _tokens(generator) if name in ON_TOKENS else _numbers(generator)


def units_of(model: nn.Module) -> list[nn.Module]:
    """Return the layers that fully_shard may treat one by one; none where they share a tensor."""
    if isinstance(model, Checkpointed):
        return [model.enter, *model.blocks, model.leave]
    if not isinstance(model, (nn.Sequential, PartlyFrozen)):
        return []
    return [child for child in model.children() if any(True for _ in child.parameters())]


def _numbers(generator: torch.Generator) -> Batch:
    return torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)


def _tokens(generator: torch.Generator) -> Batch:
    both = torch.randint(0, 11, (4, 7), generator=generator)
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def _squared_error(model: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    return (model(x) - y).square().mean()


def _cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    tokens, targets = batch
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())

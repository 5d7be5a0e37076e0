"""What the accumulation suites share: a model of words, its windows, and the whole batch at once."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import gradwatch
from tests.support.float64 import gradient_norm

IGNORED = -100
Batch = tuple[Tensor, Tensor]
Make = Callable[["Words"], list[Optimizer]]


class Words(nn.Module):
    """Predicts words: the output projection is the embedding, and another embedding is sparse."""

    def __init__(self, sparse: bool = False, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(7, 4)
        self.marks = nn.Embedding(9, 4, sparse=sparse)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.to(dtype)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.words(tokens) + self.marks((tokens + tokens.roll(1, -1)) % 9)
        return self.head(torch.tanh(self.mix(hidden)))


def batch_of(size: int, seed: int, ignored: float = 0.4) -> Batch:
    """Return so many rows of five words, of which a share has no target."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, 7, (size, 6), generator=generator)
    targets = words[:, 1:].clone()
    drop = torch.rand(targets.shape, generator=generator) < ignored
    drop[:, 0] = False
    return words[:, :-1].contiguous(), targets.masked_fill(drop, IGNORED)


def empty(batch: Batch) -> Batch:
    """Return the batch without a target."""
    return batch[0], torch.full_like(batch[1], IGNORED)


def count(batch: Batch) -> int:
    """Return the number of targets."""
    return int((batch[1] != IGNORED).sum())


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean over the targets; 0 where there is none."""
    logits, targets = model(batch[0]).flatten(0, 1), batch[1].flatten()
    total = nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)
    return total / max(count(batch), 1)


def joined(parts: Sequence[Batch]) -> Batch:
    """Return the batch that some parts make."""
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def windows_of(sizes: Sequence[Sequence[int]], **options: Any) -> list[list[Batch]]:
    """Return windows with micro-batches of these sizes."""
    return [
        [batch_of(size, 100 * w + m, **options) for m, size in enumerate(window)]
        for w, window in enumerate(sizes)
    ]


def sgd(model: Words, **options: Any) -> list[Optimizer]:
    """Return SGD with momentum."""
    return [torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, **options)]


def adamw(model: Words, **options: Any) -> list[Optimizer]:
    """Return AdamW; its epsilon is large enough not to blow rounding up."""
    return [torch.optim.AdamW(model.parameters(), lr=0.05, eps=1e-4, **options)]


def several(model: Words) -> list[Optimizer]:
    """Return one optimizer for the second embedding, which may be sparse, and one for the rest."""
    rest = [p for name, p in model.named_parameters() if name != "marks.weight"]
    return [*adamw_of(rest), torch.optim.SGD([model.marks.weight], lr=0.3)]


def adamw_of(parameters: Sequence[Tensor]) -> list[Optimizer]:
    """Return AdamW with two groups."""
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.02}]
    return [torch.optim.AdamW(groups, lr=0.05, eps=1e-4)]


@dataclass
class Trained:
    """What a training has come to."""

    weights: dict[str, Tensor]
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    clipped: list[float] = field(default_factory=list)
    watcher: Any = None

    def steps(self, optimizer: int = 0) -> Any:
        """Return the records of one optimizer."""
        table = self.watcher.history.steps().reset_index()
        return table[table["optimizer"] == sorted(set(table["optimizer"]))[optimizer]]


def start(make: Make, model: Words | None) -> tuple[Words, list[Optimizer]]:
    """Return a copy of the model, and optimizers of it."""
    model = Words() if model is None else copy.deepcopy(model)
    model.head.weight = model.words.weight
    return model, make(model)


def at_once(
    make: Make,
    windows: Sequence[Sequence[Batch]],
    model: Words | None = None,
    clip: Callable[[list[Tensor]], object] = lambda parameters: None,
) -> Trained:
    """Train without gradwatch, on each window as one batch."""
    model, optimizers = start(make, model)
    trained = Trained({})
    for window in windows:
        loss = loss_of(model, joined(window))
        loss.backward()
        trained.losses.append(loss.item())
        trained.norms.append(gradient_norm(model))
        for optimizer in optimizers:
            clip([p for group in optimizer.param_groups for p in group["params"]])
        trained.clipped.append(gradient_norm(model))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    trained.weights = weights_of(model)
    return trained


def watched(
    make: Make,
    windows: Sequence[Sequence[Batch]],
    model: Words | None = None,
    weigh: Callable[[Batch], Any] = count,
    **options: Any,
) -> Trained:
    """Train under gradwatch, micro-batch by micro-batch; every window ends with step(last=True)."""
    model, optimizers = start(make, model)
    with gradwatch.watch(model, optimizers, **options) as watcher:
        for window in windows:
            for index, part in enumerate(window):
                watcher.backward(loss_of(model, part), weight=weigh(part))
                ends = index + 1 == len(window)
                assert watcher.step(last=ends) is ends
    return Trained(weights_of(model), watcher=watcher)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal(found: Trained, expected: Trained) -> None:
    """Compare float64 weights: equal to rounding."""
    assert all(weight.dtype == torch.float64 for weight in found.weights.values())
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-12, atol=1e-14)

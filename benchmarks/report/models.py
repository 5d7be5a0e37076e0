"""Data and models of the small trainings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 8
WORDS, CONTEXT = 32, 16

Batch = tuple[Tensor, Tensor]


def vectors(batch: int = 32) -> Callable[[], Batch]:
    """Makes batches of noisy points around eight centers, in 32 dimensions."""
    centers = torch.randn(CLASSES, 32)

    def draw() -> Batch:
        labels = torch.randint(0, CLASSES, (batch,))
        return centers[labels] + torch.randn(batch, 32), labels

    return draw


def images(batch: int = 16) -> Callable[[], Batch]:
    """Makes batches of noisy images, 3 x 12 x 12."""
    patterns = torch.randn(CLASSES, 3, 12, 12)

    def draw() -> Batch:
        labels = torch.randint(0, CLASSES, (batch,))
        return patterns[labels] + 2 * torch.randn(batch, 3, 12, 12), labels

    return draw


def sentences(batch: int = 16) -> Callable[[], Batch]:
    """Makes batches of sentences of a Markov chain; the target is each next word."""
    chain = (3 * torch.randn(WORDS, WORDS)).softmax(-1)

    def draw() -> Batch:
        words = [torch.randint(0, WORDS, (batch,))]
        for _ in range(CONTEXT):
            words.append(torch.multinomial(chain[words[-1]], 1)[:, 0])
        text = torch.stack(words, 1)
        return text[:, :-1], text[:, 1:].flatten()

    return draw


def mlp(depth: int = 3, width: int = 64, act: type[nn.Module] = nn.ReLU, drop: float = 0.0) -> Any:
    """Builds a plain network."""
    layers: list[nn.Module] = [nn.Linear(32, width), act()]
    for _ in range(depth - 2):
        layers += [nn.Linear(width, width), act(), *([nn.Dropout(drop)] if drop else [])]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


def cnn() -> nn.Module:
    """Builds a convolutional network with batch normalization."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(288, CLASSES)),
    )


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Adds the output of two convolutions to the input."""
        found: Tensor = self.norm2(self.second(F.relu(self.norm1(self.first(x)))))
        return F.relu(x + found)


def resnet() -> nn.Module:
    """Builds a residual network of twelve convolutions."""
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES)]
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *(Block(16) for _ in range(5)), *head)


class Lstm(nn.Module):
    """Predicts each next word with a recurrent network."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 32)
        self.lstm = nn.LSTM(32, 64, batch_first=True)
        self.head = nn.Linear(64, WORDS)

    def forward(self, text: Tensor) -> Tensor:
        """Maps words to logits of the next one."""
        logits: Tensor = self.head(self.lstm(self.words(text))[0])
        return logits.flatten(0, 1)


class Gpt(nn.Module):
    """Predicts each next word with four blocks of causal attention."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, 48), nn.Embedding(CONTEXT, 48)
        layer = nn.TransformerEncoderLayer(48, 4, 96, 0.0, "gelu", batch_first=True)
        layer.norm_first = True
        self.blocks = nn.TransformerEncoder(layer, 4, nn.LayerNorm(48), enable_nested_tensor=False)
        self.head = nn.Linear(48, WORDS)

    def forward(self, text: Tensor) -> Tensor:
        """Maps words to logits of the next one."""
        mask = nn.Transformer.generate_square_subsequent_mask(text.shape[1])
        x = self.words(text) + self.places.weight[: text.shape[1]]
        logits: Tensor = self.head(self.blocks(x, mask=mask, is_causal=True))
        return logits.flatten(0, 1)

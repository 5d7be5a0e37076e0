"""The model of the examples: a small character GPT, and a text that every Python comes with.

The text is the source code of Python's standard library.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 128  # ASCII
CONTEXT = 64
BATCH = 16
WIDTH = 128
HEADS = 4
LAYERS = 3


class Block(nn.Module):
    """One transformer block: attention and a feed-forward layer, each added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.feed_norm = nn.LayerNorm(width)
        self.feed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[batch, time, width]`` to the same shape; attention is causal."""
        x = x + self._attend(self.attention_norm(x))
        return x + self.feed(self.feed_norm(x))

    def _attend(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.project(mixed.transpose(1, 2).flatten(2))


class GPT(nn.Module):
    """A language model over ASCII characters."""

    def __init__(self, width: int = WIDTH, layers: int = LAYERS) -> None:
        super().__init__()
        self.characters = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*[Block(width) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, characters: Tensor, following: Tensor, weights: Tensor) -> Tensor:
        """Returns the loss of predicting each next character.

        Args:
            characters: Character codes ``[batch, time]``.
            following: The codes of those that follow them ``[batch, time]``.
            weights: How much each of these counts ``[batch, time]``: 0 for padding.

        Returns:
            The weighted mean ``[]`` in nats per character.
        """
        x = self.characters(characters) + self.positions.weight[: characters.shape[1]]
        logits = self.head(self.norm(self.blocks(x)))
        losses = F.cross_entropy(logits.transpose(1, 2), following, reduction="none")
        return (losses * weights).sum() / weights.sum()


def read_library() -> tuple[Tensor, Tensor]:
    """Reads the modules of the standard library; every tenth is held out.

    Returns:
        Character codes to train on and to validate on, each int64 ``[length]``.
    """
    modules = sorted(Path(os.__file__).parent.glob("*.py"))
    held_out = modules[::10]
    return _encode(m for m in modules if m not in held_out), _encode(held_out)


def _encode(files: Iterable[Path]) -> Tensor:
    text = "".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
    return torch.frombuffer(bytearray(text.encode("ascii", "replace")), dtype=torch.uint8).long()


def batch_loss(
    model: nn.Module, text: Tensor, *, size: int = BATCH, padding_only: bool = False
) -> Tensor:
    """Draws random pieces of the text, and returns the loss of predicting each next character.

    Args:
        model: A :class:`GPT`, or a wrapper of one.
        text: Character codes ``[length]``.
        size: Number of pieces in the batch.
        padding_only: Whether to give every character the weight 0, as if the batch were all
            padding. The mean is then 0 / 0 and every gradient NaN: a common way to lose a model.

    Returns:
        The loss ``[]`` in nats per character with a weight.
    """
    device = text.device
    starts = torch.randint(len(text) - CONTEXT, (size, 1), device=device)
    pieces = text[starts + torch.arange(CONTEXT + 1, device=device)]
    weights = torch.full((size, CONTEXT), 0.0 if padding_only else 1.0, device=device)
    return model(pieces[:, :-1], pieces[:, 1:], weights)


@torch.no_grad()
def validate(model: nn.Module, text: Tensor, batches: int = 20) -> float:
    """Measures the loss on held-out text, in nats per character."""
    return float(torch.stack([batch_loss(model, text) for _ in range(batches)]).mean())

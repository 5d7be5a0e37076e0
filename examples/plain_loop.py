"""Trains a small character GPT under gradwatch in a plain loop.

The text is on every machine that has Python: the source code of its own standard library. The
learning rate is high, so that clipping has work to do. --poison-step N breaks one batch the way it
happens in practice, to show it being caught.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import gradwatch
from _summary import print_summary
from gradwatch_tensorboard import TensorBoardWriter

VOCABULARY = 128  # ASCII
CONTEXT = 64
BATCH = 16
WIDTH = 128
HEADS = 4
LAYERS = 3


class Block(nn.Module):
    """One transformer block: attention and a feed-forward layer, each added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.feed_norm = nn.LayerNorm(WIDTH)
        self.feed = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[batch, time, WIDTH]`` to the same shape; a position sees none after it."""
        x = x + self._attend(self.attention_norm(x))
        return x + self.feed(self.feed_norm(x))

    def _attend(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.project(mixed.transpose(1, 2).flatten(2))


class GPT(nn.Module):
    """A language model over ASCII characters."""

    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, characters: Tensor) -> Tensor:
        """Maps character codes ``[batch, time]`` to logits ``[batch, time, VOCABULARY]``."""
        x = self.characters(characters) + self.positions.weight[: characters.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def read_library() -> tuple[Tensor, Tensor]:
    """Reads the modules of the standard library; every tenth is held out.

    Returns:
        Character codes to train on and to validate with, each ``[length]``, int64.
    """
    modules = sorted(Path(os.__file__).parent.glob("*.py"))
    held_out = modules[::10]
    return _encode(m for m in modules if m not in held_out), _encode(held_out)


def _encode(files: Iterable[Path]) -> Tensor:
    text = "".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
    return torch.frombuffer(bytearray(text.encode("ascii", "replace")), dtype=torch.uint8).long()


def batch_loss(model: nn.Module, text: Tensor, *, padding_only: bool = False) -> Tensor:
    """Draws pieces of the text at random and lets the model guess each next character.

    Args:
        model: The model.
        text: Character codes ``[length]``.
        padding_only: Whether no character of the batch counts, as where all of it is padding. The
            mean is 0 / 0 then, and every gradient a NaN: an everyday way to lose a model.

    Returns:
        The loss in nats per character that counts, ``[]``.
    """
    starts = torch.randint(len(text) - CONTEXT, (BATCH, 1))
    pieces = text[starts + torch.arange(CONTEXT + 1)]
    logits = model(pieces[:, :-1]).flatten(0, 1)
    losses = F.cross_entropy(logits, pieces[:, 1:].flatten(), reduction="none")
    counts = torch.full_like(losses, 0.0 if padding_only else 1.0)
    return (losses * counts).sum() / counts.sum()


@torch.no_grad()
def validate(model: nn.Module, text: Tensor, batches: int = 20) -> float:
    """Measures the loss on held-out text, in nats per character."""
    return float(torch.stack([batch_loss(model, text) for _ in range(batches)]).mean())


def train(model: nn.Module, text: Tensor, args: argparse.Namespace) -> gradwatch.Watcher:
    """Trains the model.

    Args:
        model: The model, which changes.
        text: Character codes to train on.
        args: What the command line says.

    Returns:
        The watcher of the run, closed, its history still there.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    with (
        SummaryWriter(args.logdir / time.strftime("%Y%m%d-%H%M%S")) as writer,
        gradwatch.watch(
            model,
            optimizer,
            clip=args.clip or None,
            on_nonfinite=args.on_nonfinite,
            buffer_size=args.steps,
            sinks=[TensorBoardWriter(writer)],
        ) as watcher,
        tqdm(range(1, args.steps + 1), unit="step", mininterval=0.5) as progress,
    ):
        for step in progress:
            loss = batch_loss(model, text, padding_only=step == args.poison_step)
            loss.backward()
            try:
                optimizer.step()
            except gradwatch.NonFiniteGradientError as error:
                progress.write(f"stopped: {error}")
                break
            optimizer.zero_grad()
            writer.add_scalar("loss/train", loss.item(), step)
            norm = watcher.last.grad_norm
            progress.set_postfix(loss=f"{loss.item():.2f}", norm=f"{norm:.2f}", refresh=False)
    return watcher


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate")
    parser.add_argument("--clip", type=float, default=0.6, help="largest total norm; 0: no clip")
    parser.add_argument(
        "--on-nonfinite",
        choices=("record", "skip", "raise"),
        default="skip",
        help="what to do with a step whose gradients hold a NaN",
    )
    parser.add_argument(
        "--poison-step",
        type=int,
        metavar="N",
        help="make the batch of step N padding and nothing else",
    )
    parser.add_argument(
        "--logdir", type=Path, default=Path("runs/plain_loop"), help="folder for TensorBoard"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches")
    return parser.parse_args()


def main() -> None:
    """Trains, and prints what was seen."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    # The model is small: threads would wait for each other on a busy machine.
    torch.set_num_threads(1)
    training, held_out = read_library()
    model = GPT()
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(training):,} characters"
    )
    before = validate(model, held_out)
    watcher = train(model, training, args)
    print(f"held-out loss: {before:.2f} -> {validate(model, held_out):.2f} nats per character")
    print_summary(watcher, args.logdir)


if __name__ == "__main__":
    main()

"""Trains a small character GPT under gradwatch in a plain loop.

The text is on every machine that has Python: the source code of its standard library. The learning
rate is high, so that clipping has something to do. --poison-step N breaks one batch in the way that
it happens in practice, to show how gradwatch catches it, and finds the line that made the NaN.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import gradwatch
from _gpt import GPT, batch_loss, read_library, validate
from _summary import print_summary
from gradwatch_tensorboard import TensorBoardWriter


def train(model: nn.Module, text: Tensor, args: argparse.Namespace) -> gradwatch.Watcher:
    """Trains the model in place on a text of character codes.

    Returns:
        The watcher of the run; it is closed, but its history can still be read.
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
        choices=("record", "skip", "explain", "raise"),
        default="explain",
        help="what to do with a step whose gradients hold a NaN",
    )
    parser.add_argument(
        "--poison-step",
        type=int,
        metavar="N",
        help="fill the batch of step N with nothing but padding",
    )
    parser.add_argument(
        "--logdir", type=Path, default=Path("runs/plain_loop"), help="folder for TensorBoard"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches")
    return parser.parse_args()


def main() -> None:
    """Trains, and prints a summary."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    # The model is small: several threads would only wait for each other.
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

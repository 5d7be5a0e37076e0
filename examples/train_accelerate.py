"""Trains a small network with Hugging Face Accelerate, under gradwatch.

    python examples/train_accelerate.py
    accelerate launch examples/train_accelerate.py
    torchrun --nproc-per-node 2 examples/train_accelerate.py

Four micro-batches make a step, accelerate clips, and its TensorBoard tracker gets the numbers of
both sides. The data is made here. --poison-step N puts a NaN into one batch, to show how gradwatch
leaves the step out, and says where the NaN came from.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gradwatch
from _summary import print_summary
from gradwatch_huggingface import AcceleratorSink

FEATURES = 16
EXAMPLES = 8192
BATCH = 64
WIDTH = 256
MICRO_BATCHES = 4


def make_data(seed: int) -> TensorDataset:
    """Makes inputs ``[n, 16]``, and targets ``[n, 1]`` that depend on them in a curved way."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(EXAMPLES, FEATURES, generator=generator)
    return TensorDataset(inputs, (inputs[:, :4].sum(1, keepdim=True) * 2).sin())


def make_model(seed: int) -> nn.Module:
    """Makes a network for that."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(FEATURES, WIDTH),
        nn.GELU(),
        nn.Linear(WIDTH, WIDTH),
        nn.GELU(),
        nn.Linear(WIDTH, 1),
    )


def endless(loader: DataLoader[tuple[Tensor, ...]]) -> Iterator[list[Tensor]]:
    """Yields the batches of epoch after epoch."""
    while True:
        yield from loader


def train(accelerator: Accelerator, args: argparse.Namespace) -> gradwatch.Watcher:
    """Trains for some steps.

    Returns:
        The watcher of this process; it is closed, but its history can still be read.
    """
    model = make_model(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    loader = DataLoader(make_data(args.seed), batch_size=BATCH, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    with gradwatch.watch(
        model,
        optimizer,
        on_nonfinite=args.on_nonfinite,
        buffer_size=args.steps,
        sinks=[AcceleratorSink(accelerator)],
    ) as watcher:
        step = 0
        for inputs, targets in endless(loader):
            if step + 1 == args.poison_step:
                inputs[0, 0] = float("nan")
            with accelerator.accumulate(model):
                loss = (model(inputs) - targets).square().mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients and args.clip:
                    accelerator.clip_grad_norm_(model.parameters(), args.clip)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                step += 1
                accelerator.log({"loss/train": loss.item()}, step=step)
            if step == args.steps:
                break
    return watcher


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (100)")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate (0.003)")
    parser.add_argument(
        "--clip", type=float, default=0.2, help="largest total norm; 0: no clip (0.2)"
    )
    parser.add_argument(
        "--on-nonfinite",
        choices=("record", "skip", "explain"),
        default="explain",
        help="what to do with a step whose gradients hold a NaN (explain)",
    )
    parser.add_argument("--poison-step", type=int, metavar="N", help="put a NaN into this step")
    logdir = Path("runs", "train_accelerate")
    parser.add_argument("--logdir", type=Path, default=logdir, help="folder for TensorBoard")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches (0)")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    return args


def main() -> None:
    """Trains, and prints a summary."""
    args = parse_arguments()
    accelerator = Accelerator(
        # Without a GPU several processes find each other only if accelerate is told so.
        cpu=not torch.cuda.is_available(),
        gradient_accumulation_steps=MICRO_BATCHES,
        log_with="tensorboard",
        project_dir=args.logdir,
    )
    accelerator.init_trackers(time.strftime("%Y%m%d-%H%M%S"))
    watcher = train(accelerator, args)
    accelerator.end_training()
    if accelerator.is_main_process:
        print_summary(watcher, args.logdir)


if __name__ == "__main__":
    main()

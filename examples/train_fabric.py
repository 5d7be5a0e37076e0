"""Trains a small network with Lightning Fabric, under gradwatch.

The data is made: points on two spirals that wind around each other. Fabric accumulates two
micro-batches, and clips. --poison-step N puts a NaN into a batch, and gradwatch says where it is.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F

import gradwatch
from _summary import print_summary
from gradwatch_lightning import FabricSink

POINTS = 64
MICRO_BATCHES = 2


def spirals(points: int) -> tuple[Tensor, Tensor]:
    """Draws points on two spirals.

    Returns:
        Points ``[points, 2]`` between -1 and 1, and for each the number of its spiral, 0 or 1.
    """
    which = torch.randint(2, (points,))
    turn = torch.rand(points).sqrt()
    angle = 3 * math.pi * turn + math.pi * which
    on_spiral = torch.stack([turn * angle.cos(), turn * angle.sin()], dim=1)
    return on_spiral + 0.02 * torch.randn(points, 2), which


def train(fabric: Fabric, network: nn.Module, args: argparse.Namespace) -> gradwatch.Watcher:
    """Trains the network in place.

    Returns:
        The watcher of the run; it is closed, but its history can still be read.
    """
    model, optimizer = fabric.setup(network, torch.optim.AdamW(network.parameters(), lr=args.lr))
    with gradwatch.watch(
        model, optimizer, on_nonfinite=args.on_nonfinite, sinks=[FabricSink(fabric, blocks=True)]
    ) as watcher:
        for step in range(1, args.steps + 1):
            for micro_batch in range(MICRO_BATCHES):
                inputs, targets = spirals(POINTS)
                if step == args.poison_step:
                    inputs[7] = math.nan
                is_last = micro_batch == MICRO_BATCHES - 1
                with fabric.no_backward_sync(model, enabled=not is_last):
                    loss = F.cross_entropy(model(inputs), targets)
                    fabric.backward(loss / MICRO_BATCHES)
            if args.clip:
                fabric.clip_gradients(
                    model, optimizer, max_norm=args.clip, error_if_nonfinite=False
                )
            optimizer.step()
            optimizer.zero_grad()
            fabric.log("loss/train", loss, step=step)
    return watcher


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps")
    parser.add_argument("--lr", type=float, default=1e-2, help="learning rate")
    parser.add_argument("--clip", type=float, default=0.5, help="largest total norm; 0: no clip")
    parser.add_argument(
        "--on-nonfinite",
        choices=("record", "skip", "explain", "raise"),
        default="explain",
        help="what to do with a step whose gradients hold a NaN",
    )
    parser.add_argument(
        "--poison-step", type=int, metavar="N", help="put a NaN into the batches of step N"
    )
    parser.add_argument("--precision", default="32-true", help="that of Fabric, bf16-mixed say")
    parser.add_argument(
        "--logdir", type=Path, default=Path("runs/train_fabric"), help="folder for TensorBoard"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches")
    return parser.parse_args()


def main() -> None:
    """Trains, and prints a summary."""
    args = parse_arguments()
    logger = TensorBoardLogger(args.logdir.parent, name=args.logdir.name)
    fabric = Fabric(accelerator="cpu", devices=1, precision=args.precision, loggers=logger)
    fabric.seed_everything(args.seed)
    # The network is small: several threads would only wait for each other.
    torch.set_num_threads(1)
    network = nn.Sequential(
        nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2)
    )
    watcher = train(fabric, network, args)
    logger.finalize("success")
    inputs, targets = spirals(2_000)
    with torch.no_grad():
        right = network(inputs.to(next(network.parameters()).dtype)).argmax(dim=1) == targets
    print(f"held-out accuracy: {right.float().mean():.1%}")
    print_summary(watcher, args.logdir)


if __name__ == "__main__":
    main()

"""Shared by the examples that run on several ranks."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from _summary import command


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows default values, and keeps the line breaks of the description."""


def make_parser(script: str, description: str | None) -> argparse.ArgumentParser:
    """Makes a command line parser with the options that all scripts share.

    Args:
        script: Path of the script, whose name is used for the default log folder.
        description: Shown at the top of the help.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=_Formatter)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps")
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
        help="at step N, fill the batches of one rank with nothing but padding",
    )
    parser.add_argument("--poison-rank", type=int, default=1, metavar="R", help="which rank")
    logdir = Path("runs", Path(script).stem)
    parser.add_argument("--logdir", type=Path, default=logdir, help="folder for TensorBoard")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches")
    return parser


def parse_arguments(parser: argparse.ArgumentParser, script: str) -> argparse.Namespace:
    """Reads the command line, and exits with a hint unless torchrun started the script."""
    args = parser.parse_args()
    ranks = int(os.environ.get("WORLD_SIZE", "0"))
    if not ranks:
        start = f"{command('torchrun')} --nproc-per-node 2 {os.path.relpath(script)}"
        parser.error(f"this script runs on several ranks. Start it with: {start}")
    if args.poison_step is not None and not 0 <= args.poison_rank < ranks:
        parser.error(f"--poison-rank must be from 0 to {ranks - 1}, got {args.poison_rank}")
    return args


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Joins the process group, and leaves it at the end, also after an error.

    Yields:
        The device of this rank: a GPU if each rank has one to itself, otherwise the CPU.
    """
    place, places = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cpu")
    if torch.cuda.device_count() >= places:
        device = torch.device("cuda", place)
        torch.cuda.set_device(device)
    # The model is small: several threads would only wait for each other.
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def print_by_rank(title: str, row: dict[str, str]) -> None:
    """Prints a table with one line per rank; every rank must call this.

    Only rank 0 prints: lines that the ranks print themselves would be mixed up.

    Args:
        title: Printed above the table.
        row: The values of this rank, by column.
    """
    rows: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(rows, row)
    if dist.get_rank() > 0:
        return
    print(f"\n{title}")
    lines = [["rank", *row], *([str(rank), *row.values()] for rank, row in enumerate(rows))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  " + "  ".join(cells).rstrip())

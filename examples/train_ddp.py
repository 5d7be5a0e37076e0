"""Trains a small character GPT on several ranks with DistributedDataParallel, under gradwatch.

    torchrun --nproc-per-node 2 examples/train_ddp.py

Each rank draws its own batches. With --poison-step N one rank produces NaN at step N. After the
all-reduce every rank has that NaN, so all of them skip the same step. The norm before the
all-reduce tells which rank it was.
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import gradwatch
from _gpt import GPT, batch_loss, read_library, validate
from _ranks import make_parser, parse_arguments, print_by_rank, process_group
from _summary import print_summary
from gradwatch_tensorboard import TensorBoardWriter

MICRO_BATCHES = 2


def train(
    model: DistributedDataParallel, text: Tensor, args: argparse.Namespace
) -> gradwatch.Watcher:
    """Trains the model in place on a text of character codes.

    Returns:
        The watcher of this rank; it is closed, but its history can still be read.
    """
    rank = dist.get_rank()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    logdir = args.logdir / time.strftime("%Y%m%d-%H%M%S")
    sinks = [TensorBoardWriter(logdir)] if rank == 0 else []
    with (
        gradwatch.watch(
            model,
            optimizer,
            clip=args.clip or None,
            on_nonfinite=args.on_nonfinite,
            buffer_size=args.steps,
            sinks=sinks,
        ) as watcher,
        tqdm(range(1, args.steps + 1), unit="step", mininterval=0.5, disable=rank > 0) as progress,
    ):
        for step in progress:
            sick = step == args.poison_step and rank == args.poison_rank
            for micro_batch in range(1, MICRO_BATCHES + 1):
                # Gradients accumulate on this rank; only the last backward reduces them.
                with nullcontext() if micro_batch == MICRO_BATCHES else model.no_sync():
                    loss = batch_loss(model, text, padding_only=sick)
                    (loss / MICRO_BATCHES).backward()
            try:
                optimizer.step()
            except gradwatch.NonFiniteGradientError as error:
                if rank == 0:
                    progress.write(f"stopped: {error}")
                break
            optimizer.zero_grad()
            norm = watcher.last.grad_norm
            progress.set_postfix(loss=f"{loss.item():.2f}", norm=f"{norm:.2f}", refresh=False)
    return watcher


def print_step_by_rank(watcher: gradwatch.Watcher, step: int) -> None:
    """Prints one step as each rank saw it.

    With ``--on-nonfinite raise`` the step may never have been taken.
    """
    steps = watcher.history.steps()
    events = [event for event in watcher.events if event.step == step]
    row = {"own norm": "-", "reduced norm": "-", "outcome": "not taken"}
    if step in steps.index:
        seen = steps.loc[step]
        row["own norm"] = f"{seen['grad_norm_local']:.4f}"
        row["reduced norm"] = f"{seen['grad_norm']:.4f}"
        row["outcome"] = seen["outcome"]
    row["first event"] = "none"
    if events:
        first = events[0]
        where = f"micro-batch {first.micro_batch}" if first.micro_batch else "from another rank"
        row["first event"] = f"{first.kind} in {first.parameter}, {where}"
    print_by_rank(f"Step {step} as each rank saw it:", row)


def main() -> None:
    """Trains, and prints a summary."""
    parser = make_parser(__file__, __doc__)
    args = parse_arguments(parser, __file__)
    with process_group() as device:
        rank = dist.get_rank()
        training, held_out = (text.to(device) for text in read_library())
        torch.manual_seed(args.seed)
        model = DistributedDataParallel(GPT().to(device))
        torch.manual_seed(args.seed + rank)
        before = validate(model, held_out)
        watcher = train(model, training, args)
        after = validate(model, held_out)
        if rank == 0:
            print(f"held-out loss: {before:.2f} -> {after:.2f} nats per character")
        print_step_by_rank(watcher, min(args.poison_step or args.steps, args.steps))
        if rank == 0:
            print_summary(watcher, args.logdir)
            if args.poison_step is None:
                print("Then see one rank go bad: the same command with --poison-step 20")


if __name__ == "__main__":
    main()

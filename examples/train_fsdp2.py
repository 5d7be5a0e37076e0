"""Trains a small character GPT whose weights are sharded over several ranks, under gradwatch.

    torchrun --nproc-per-node 2 examples/train_fsdp2.py

With FSDP2 (fully_shard) each rank holds a part of every gradient. gradwatch measures the parts,
adds them up over the ranks and clips by the norm of the whole gradient. All ranks see the same
numbers, and with --poison-step N they all skip the same step. Every rank must be watched.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

import gradwatch
from _gpt import GPT, batch_loss, read_library, validate
from _ranks import make_parser, parse_arguments, print_by_rank, process_group
from _summary import print_summary
from gradwatch_tensorboard import TensorBoardWriter

MICRO_BATCHES = 2


def shard(model: GPT, mesh: dist.DeviceMesh, bf16: bool) -> GPT:
    """Shards a model block by block, and then the rest of it.

    Args:
        model: Must be the same on every rank.
        mesh: The ranks to shard over.
        bf16: Whether to compute in bfloat16; weights and gradients stay float32.

    Returns:
        The same model; its parameters are DTensors now.
    """
    inner, outer = MixedPrecisionPolicy(), MixedPrecisionPolicy()
    if bf16:
        inner = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
        outer = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=inner)
    return fully_shard(model, mesh=mesh, mp_policy=outer)


def held_out_loss(model: FSDPModule, text: Tensor) -> float:
    """Measures the loss on held-out text, in nats per character; every rank must call this."""
    loss = validate(model, text)
    # A forward leaves the outermost weights unsharded until the next backward, and there is none.
    model.reshard()
    return loss


def train(model: FSDPModule, text: Tensor, args: argparse.Namespace) -> gradwatch.Watcher:
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
                model.set_requires_gradient_sync(micro_batch == MICRO_BATCHES)
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


def print_shares(model: FSDPModule, watcher: gradwatch.Watcher) -> None:
    """Prints how much of the model each rank holds, and the norms that it saw: all the same."""
    steps = watcher.history.steps()
    if steps.empty:
        return
    norms = steps["grad_norm"]
    held = sum(p.to_local().numel() for p in model.parameters())
    whole = sum(p.numel() for p in model.parameters())
    print_by_rank(
        "The whole gradient, as each rank saw it:",
        {
            "holds": f"{held / whole:.0%} of {whole:,} parameters",
            "first norm": f"{norms.iloc[0]:.5f}",
            "last norm": f"{norms.iloc[-1]:.5f}",
            "skipped": f"{(steps['outcome'] != 'applied').sum()} of {len(steps)} steps",
        },
    )


def main() -> None:
    """Trains, and prints a summary."""
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    args = parse_arguments(parser, __file__)
    with process_group() as device:
        rank = dist.get_rank()
        mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
        training, held_out = (text.to(device) for text in read_library())
        torch.manual_seed(args.seed)
        model = shard(GPT().to(device), mesh, args.bf16)
        torch.manual_seed(args.seed + rank)
        before = held_out_loss(model, held_out)
        watcher = train(model, training, args)
        after = held_out_loss(model, held_out)
        if rank == 0:
            print(f"held-out loss: {before:.2f} -> {after:.2f} nats per character")
        print_shares(model, watcher)
        if rank == 0:
            print_summary(watcher, args.logdir)


if __name__ == "__main__":
    main()

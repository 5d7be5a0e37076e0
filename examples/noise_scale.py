"""Trains a small character GPT whose batch size follows the gradient noise scale.

The text is on every machine that has Python: the source code of its standard library. Each step
accumulates micro-batches. Their noise tells how many of them are worth it, and
accumulate=AccumulateByNoiseScale(...) adjusts the number. The script prints a table of what was
measured and chosen, and draws it. --compare trains again with fixed batches on as many sequences.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

import gradwatch
from _gpt import CONTEXT, GPT, batch_loss, read_library, validate
from _noise_plot import MISSING, Run, can_draw, draw
from _summary import print_summary
from gradwatch_tensorboard import TensorBoardWriter

WIDTH, LAYERS = 64, 2  # small, so that a minute is enough to see the noise scale grow
ROWS = 16
LR_POWERS = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}

EXPLANATION = """
Sizes are in sequences of {context} characters; a micro-batch has {size} of them. The noise scale is
the batch size at which the gradient is as much noise as signal. Well below it, twice the batch
needs nearly half the steps; well above it, hardly fewer.
"""
COST = """
On a single device all of these runs are the same amount of work. If micro-batches run on several
devices at once, the time depends on the number of steps, which a larger batch reduces.
"""


def train(args: argparse.Namespace, accumulate: gradwatch.AccumulateByNoiseScale) -> Run:
    """Trains a model whose batch follows the noise scale, and prints a table of its progress."""
    print(EXPLANATION.format(context=CONTEXT, size=args.micro_batch))
    print("  step  sequences   loss     noise scale   batch       lr")
    sinks = [TensorBoardWriter(args.logdir / time.strftime("%Y%m%d-%H%M%S"))]
    model, watcher = make(args, accumulate, args.lr, args.steps, sinks)
    told, every = 0, max(1, args.steps // ROWS)
    start = time.process_time()
    for step in each_step(model, watcher, args, args.steps):
        if step % every == 0 or step == args.steps:
            print_row(watcher, every)
        for event in watcher.events[told:]:
            told += 1
            print(f"        {event.message}")
    seconds = time.process_time() - start
    print_summary(watcher, args.logdir)
    return Run("auto", watcher.history.steps(), held_out(model, args), seconds)


def train_fixed(args: argparse.Namespace, micro_batches: int, sequences: int) -> Run:
    """Trains a model with the same batch size and learning rate in every step.

    Args:
        args: The command line. The learning rate is the one that the other run has at this batch.
        micro_batches: Number of micro-batches in each step.
        sequences: Number of sequences to train on in all.
    """
    batch = micro_batches * args.micro_batch
    number = max(1, round(sequences / batch))
    lr = args.lr * (micro_batches / args.min) ** LR_POWERS[args.scale_lr]
    model, watcher = make(args, micro_batches, lr, number, [])
    start = time.process_time()
    for _ in each_step(model, watcher, args, number):
        pass
    seconds = time.process_time() - start
    return Run(f"always {batch}", watcher.history.steps(), held_out(model, args), seconds)


def make(
    args: argparse.Namespace,
    accumulate: int | gradwatch.AccumulateByNoiseScale,
    lr: float,
    number: int,
    sinks: Sequence[gradwatch.Sink],
) -> tuple[nn.Module, gradwatch.Watcher]:
    """Makes a model, always with the same initial weights, and the watcher of its run."""
    torch.manual_seed(args.seed)
    model = GPT(WIDTH, LAYERS)
    watcher = gradwatch.watch(
        model,
        torch.optim.AdamW(model.parameters(), lr=lr),
        accumulate=accumulate,
        clip=args.clip or None,
        on_nonfinite=args.on_nonfinite,
        buffer_size=number,
        sinks=sinks,
    )
    return model, watcher


def each_step(
    model: nn.Module, watcher: gradwatch.Watcher, args: argparse.Namespace, number: int
) -> Iterator[int]:
    """Trains for ``number`` optimizer steps, and yields after each.

    This is all that a loop has to do: pass a weight to every backward, and call step after it.
    """
    text, _ = read_library()
    with watcher:
        step = 0
        while step < number:
            loss = batch_loss(model, text, size=args.micro_batch)
            watcher.backward(loss, weight=args.micro_batch)
            watcher.step()
            if watcher.last is not None and watcher.last.step > step:
                step = watcher.last.step
                yield step


def held_out(model: nn.Module, args: argparse.Namespace) -> float:
    """Measures the loss on text that no run has seen, on the same pieces for every run."""
    _, text = read_library()
    torch.manual_seed(args.seed)
    return validate(model, text, batches=60)


def print_row(watcher: gradwatch.Watcher, every: int) -> None:
    """Prints a row of the table; its loss is the mean over the last ``every`` steps."""
    noise, steps = watcher.noise_scale, watcher.history.steps()
    last, sequences, loss = steps.iloc[-1], steps["weight"].sum(), steps["loss"].tail(every).mean()
    scale = f"{noise.b_simple:.0f} \N{PLUS-MINUS SIGN} {noise.stderr:.0f}" if noise.valid else "?"
    why = "" if noise.valid else f"   ({noise.reason})"
    print(
        f"{len(steps):>6}  {sequences:>9,.0f}  {loss:>5.2f}  {scale:>14}  {last['weight']:>6.0f}"
        f"  {last['lr']:>7.2g}{why}"
    )


def print_comparison(runs: list[Run]) -> None:
    """Prints the final loss of each run, and how many steps it took."""
    print(f"\nThe same {runs[0].sequences:,} sequences, in batches of different sizes:\n")
    print("  batch          steps   held-out loss   CPU seconds")
    for run in runs:
        print(
            f"  {run.name:<12} {run.number:>7,}   {run.held_out:>13.3f}   {run.cpu_seconds:>11.0f}"
        )
    print(COST)


def parse_arguments() -> tuple[argparse.Namespace, gradwatch.AccumulateByNoiseScale]:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=800, help="optimizer steps")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences of one backward")
    parser.add_argument("--min", type=int, default=2, help="least micro-batches of a step")
    parser.add_argument("--max", type=int, default=64, help="most micro-batches of a step")
    parser.add_argument(
        "--scale-lr",
        choices=tuple(LR_POWERS),
        default="sqrt",
        help="how the learning rate follows the batch: sqrt is for Adam",
    )
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate of the first batch")
    parser.add_argument("--clip", type=float, default=1.0, help="largest total norm; 0: no clip")
    parser.add_argument(
        "--on-nonfinite",
        choices=("record", "skip", "raise"),
        default="skip",
        help="what to do with a step whose gradients hold a NaN",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="also train with fixed batches on as many sequences: takes three times as long",
    )
    parser.add_argument(
        "--logdir", type=Path, default=Path("runs/noise_scale"), help="folder for TensorBoard"
    )
    parser.add_argument("--out", type=Path, help="plot to write; by default next to the logdir")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches")
    args = parser.parse_args()
    if args.micro_batch < 1 or args.steps < 1:
        parser.error("--steps and --micro-batch must be at least 1")
    scale_lr = None if args.scale_lr == "none" else args.scale_lr
    try:
        policy = gradwatch.AccumulateByNoiseScale(args.min, args.max, scale_lr=scale_lr)
    except ValueError as error:
        parser.error(str(error))
    args.out = args.out or args.logdir.with_name(f"{args.logdir.name}.png")
    return args, policy


def main() -> None:
    """Trains, and prints and draws the results."""
    args, policy = parse_arguments()
    # The model is small: several threads would only wait for each other.
    torch.set_num_threads(1)
    if not can_draw():
        print(MISSING)
    runs = [train(args, policy)]
    if args.compare:
        for micro_batches in dict.fromkeys((args.min, policy.micro_batches)):
            runs.append(train_fixed(args, micro_batches, runs[0].sequences))
        print_comparison(runs)
    if can_draw():
        draw(runs, args.out)
        print(f"Plot: {args.out}")


if __name__ == "__main__":
    main()

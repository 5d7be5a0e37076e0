"""Measures how the cost of gradwatch grows with parameters, steps, ranks and statistics.

    python -m benchmarks.scaling              # about 6 minutes
    python -m benchmarks.scaling --quick      # a minute or two; only shows that everything runs

Writes benchmarks/SCALING.md, and benchmarks/scaling.png if matplotlib is installed (`pip install
'gradwatch[plot]'`). docs/cost.md says what that means for a thousand ranks.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.overhead.operators import operator_time
from benchmarks.page import machine_rows, say, table
from benchmarks.scaling.parameters import sizes, statistics_added
from benchmarks.scaling.ranks import KINDS, Ranks, run_ranks
from benchmarks.scaling.report import (
    draw,
    operator_text,
    rank_table,
    size_table,
    statistic_table,
    step_table,
)
from benchmarks.scaling.steps import all_steps

OUT = Path(__file__).parents[1] / "SCALING.md"
PARAMETERS = 30  # of the synthetic run
HEAD = """# How the cost of gradwatch grows

`python -m benchmarks.scaling` wrote this page; do not edit it. Medians, quartiles in brackets."""
QUICK_NOTE = "**This was a quick run, which only shows that everything runs.**"
TEXTS = {
    "parameters": "Memory is what Python and NumPy hold for the watcher: mostly the buffer of "
    "1,024 steps, 4 bytes for each parameter and step.",
    "steps": f"The synthetic run has {PARAMETERS} parameters; its time is that spent in the "
    "training's thread, without the training itself. The real loop has one tiny tensor; its time "
    "is the whole step. Memory is the growth of a separate process since its first steps.",
    "ranks": "`watch(clip=)` with every step clipped, 60 tensors, processes on one machine. "
    "With more ranks than cores they wait for each other, watched or not.",
    "statistics": "300 tensors of 16 elements, measured in every step. With `every=10`, only a "
    "tenth of the steps pays for what goes beyond `norm`, which is always measured.",
}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    choose = parser.add_argument
    choose("--quick", action="store_true", help="fewer of everything")
    choose("--parameters", nargs="+", type=int, help="default: 10 100 1000 10000")
    choose("--steps", type=int, help="synthetic steps; default: 1000000")
    choose("--watched-steps", type=int, help="real steps; default: 100000")
    choose("--ranks", nargs="+", type=int, help="default: 1 2 4")
    choose("--rounds", type=int, help="default: 5")
    choose("--threads", type=int, default=torch.get_num_threads(), help="threads of PyTorch")
    choose("--out", type=Path, default=OUT, help="the page; the plot is written next to it")
    args = parser.parse_args(argv)
    usual: dict[str, object] = {
        "parameters": [10, 100, 1_000] if args.quick else [10, 100, 1_000, 10_000],
        "steps": 20_000 if args.quick else 1_000_000,
        "watched_steps": 5_000 if args.quick else 100_000,
        "ranks": [1, 2] if args.quick else [1, 2, 4],
        "rounds": 2 if args.quick else 5,
    }
    for name, value in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
        number = getattr(args, name)
        least = min(number) if isinstance(number, list) else number
        if least < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {least}.")
    return args


class Page:
    """The page of results, rewritten after every part, so that an interrupted run leaves it."""

    def __init__(self, path: Path, parts: Sequence[str]) -> None:
        """Writes the beginning of the page."""
        self._path, self._parts = path, list(parts)
        self.add()

    def add(self, *parts: str) -> None:
        """Adds paragraphs, and writes the page."""
        self._parts += parts
        self._path.write_text("\n\n".join(self._parts) + "\n", encoding="utf-8")


def measure_ranks(args: argparse.Namespace) -> list[Ranks]:
    """Measures all numbers of ranks, with DDP and with FSDP2."""
    found = []
    for kind in KINDS:
        for ranks in args.ranks:
            say(f"{kind}, {ranks} rank(s)")
            found.append(run_ranks(kind, ranks, args.rounds))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measures everything, and writes the page after each part."""
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    machine = table(["", ""], machine_rows("cpu", args.threads, "wall"))
    page = Page(args.out, [HEAD, machine, *[QUICK_NOTE] * args.quick])
    found = sizes(args.parameters, args.rounds, say)
    page.add("## Parameters", TEXTS["parameters"], size_table(found))
    say(f"operators of watch() on {args.parameters[-1]:,} tensors")
    operators = operator_time(args.parameters[-1], args.rounds, turns=3)
    page.add(operator_text(operators, args.parameters[-1]))
    say("statistics")
    statistics = statistics_added(300, args.rounds)
    page.add("## Statistics", TEXTS["statistics"], statistic_table(statistics))
    ranks = measure_ranks(args)
    page.add("## Ranks", TEXTS["ranks"], rank_table(ranks))
    steps = all_steps(args.steps, args.watched_steps, PARAMETERS, say)
    page.add("## Steps", TEXTS["steps"], step_table(steps))
    picture = args.out.with_name("scaling.png")
    if find_spec("matplotlib") is None:
        say("matplotlib is missing, so nothing is drawn: pip install 'gradwatch[plot]'")
    else:
        draw(picture, found, steps, ranks, statistics)
        page.add(f"![How the cost grows]({picture.name})")
    say(f"done: {args.out.name}")


if __name__ == "__main__":
    main()

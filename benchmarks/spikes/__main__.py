"""Trains a small language model under every clipping policy, and hurts it.

    python -m benchmarks.spikes --plot spikes.png      # some 10 minutes on a quiet machine
    python -m benchmarks.spikes --quick                # shows that all runs, no more

A character LSTM of 66,432 parameters learns the text of Python's standard library. Its gradients
are spoilt in one way at a time, inside the backward, so that each policy meets what it would meet
in a real run: all go through ``gradwatch.watch``. Runs of one seed see the same batches and the
same noise. Printed are the final held-out loss, what the spikes cost of it, the steps to recover,
and how often a policy clips where nothing is wrong; then the same rules on plain sequences of
norms, and whether ``clip="auto"`` reaches what was asked of it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.spikes.plot import draw
from benchmarks.spikes.tables import Runs, show, show_norms
from benchmarks.spikes.training import (
    AUTO,
    AUTO_SKIP,
    CLEAN,
    LEFT_OUT,
    OPTIMIZERS,
    PLAIN,
    POLICIES,
    RESCALED,
    SPIKES,
    Run,
    Task,
    train,
)


def tasks_of(args: argparse.Namespace) -> list[Task]:
    """Lists the runs, one seed after the other."""
    tasks = []
    for seed in range(args.seeds):
        for optimizer in args.optimizer:
            for policy in args.policies:
                scenarios = [CLEAN, *SPIKES]
                if policy == AUTO:
                    scenarios += [LEFT_OUT, *(RESCALED if optimizer == "SGD" else ())]
                if policy == PLAIN:
                    scenarios = [CLEAN, "NaN"]
                tasks += [Task(policy, s, optimizer, seed, args.steps) for s in scenarios]
    return tasks


def run_all(tasks: Sequence[Task], jobs: int, results: Path | None) -> Runs:
    """Runs what is not in the file of results yet, and adds it there.

    Args:
        tasks: What to run.
        jobs: Processes.
        results: A file with a line of JSON per run; None for none.

    Returns:
        All runs, in the order of the tasks.
    """
    runs: Runs = {}
    if results is not None and results.exists():
        for line in results.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            runs[Task(**entry["task"])] = Run(**entry["run"])
    missing = [task for task in tasks if task not in runs]
    start = time.perf_counter()
    for number, (task, run) in enumerate(zip(missing, _trained(missing, jobs), strict=True), 1):
        runs[task] = run
        if results is not None:
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"task": asdict(task), "run": asdict(run)}) + "\n")
        if number % 20 == 0 or number == len(missing):
            print(f"{number}/{len(missing)} runs, {time.perf_counter() - start:.0f} s", flush=True)
    return {task: runs[task] for task in tasks}


def _trained(tasks: Sequence[Task], jobs: int) -> Iterator[Run]:
    if jobs == 1:
        yield from map(train, tasks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        yield from pool.map(train, tasks, chunksize=1)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the description as it is."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.spikes", description=__doc__, formatter_class=_Help
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300, help="of each run; at least 100")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--optimizer", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--results", type=Path, help="keep the runs here, and go on from there")
    parser.add_argument("--plot", type=Path, help="draw the picture into this file")
    parser.add_argument("--quick", action="store_true", help="one seed, 100 steps, a few policies")
    parser.add_argument("--no-norms", action="store_true", help="leave out the norms alone")
    args = parser.parse_args(arguments)
    if args.quick:
        args.seeds, args.steps = 1, 100
        args.policies = ["no clip", "fixed 1.0", "ZClip, published", AUTO, AUTO_SKIP]
    if args.steps < 100:
        parser.error(f"--steps must be at least 100, got {args.steps}: the spikes need room")
    return args


def main() -> None:
    """Trains, and prints the tables."""
    args = parse_arguments()
    torch.set_num_threads(1)
    runs = run_all(tasks_of(args), args.jobs, args.results)
    print(f"torch {torch.__version__}, {platform.machine()}, {time.strftime('%Y-%m-%d')}")
    show(runs)
    if not args.no_norms:
        show_norms()
    if args.plot is not None:
        draw(runs, args.plot)


if __name__ == "__main__":
    main()

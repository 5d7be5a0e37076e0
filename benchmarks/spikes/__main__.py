"""Trains a small language model under every clipping policy, with gradient spikes.

    python -m benchmarks.spikes --plot spikes.png      # some 10 minutes on a quiet machine
    python -m benchmarks.spikes --quick                # only shows that everything runs

A character LSTM of 66,432 parameters learns the text of Python's standard library. Its gradients
are corrupted in one way at a time, inside the backward, so that each policy faces what it would
face in a real run; all runs go through ``gradwatch.watch``. Runs with the same seed see the same
batches and the same noise. The script prints the final held-out loss, how much the spikes add to
it, the steps to recover, and how often a policy clips when nothing is wrong. Then it tries the same
policies on plain sequences of norms, and checks the targets for ``clip="auto"``.
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
    """Returns the runs to do, one seed after another."""
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
    """Does the runs that are not in the file of results yet, and appends them to it.

    Args:
        tasks: All runs that are wanted.
        jobs: Number of processes.
        results: A file with one line of JSON per run; None to keep no file.

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
    """Shows default values, and keeps the line breaks of the description."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.spikes", description=__doc__, formatter_class=_Help
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300, help="steps per run; at least 100")
    parser.add_argument("--jobs", type=int, default=2, help="processes, with one thread each")
    parser.add_argument("--optimizer", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--results", type=Path, help="file to keep runs in, and to continue from")
    parser.add_argument("--plot", type=Path, help="write the plot to this file")
    parser.add_argument("--quick", action="store_true", help="one seed, 100 steps, a few policies")
    parser.add_argument("--no-norms", action="store_true", help="leave out the plain norms")
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

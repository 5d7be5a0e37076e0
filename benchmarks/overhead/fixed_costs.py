"""What is measured once, whatever the model: counts, memory, the import, time in operators."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

import gradwatch
from benchmarks.memory import resident_bytes
from benchmarks.overhead.counts import calls_added, numbers_added
from benchmarks.overhead.operators import OperatorTime, operator_time

IMPORT = (
    "import time, torch; t = time.perf_counter(); import gradwatch; print(time.perf_counter() - t)"
)


@dataclass(frozen=True)
class FixedCosts:
    """These numbers; None where one was not measured.

    Attributes:
        calls: By what the watcher does, the ATen calls that it adds for 10 and 10,000 tensors.
        numbers: By the same, how often it asks for a number on an accelerator's path.
        memory: Bytes that the process grew by from step 10,000 on, and up to which step.
        import_s: Seconds of ``import gradwatch`` after ``import torch``.
        operators: The time of ``watch()`` on 10,000 small tensors.
    """

    calls: dict[str, tuple[int, int]] | None = None
    numbers: dict[str, int] | None = None
    memory: tuple[int, int] | None = None
    import_s: float | None = None
    operators: OperatorTime | None = None


MANY = 10_000
MEMORY_FROM = 10_000
MEMORY_TO = {False: 100_000, True: 20_000}  # by quick
WATCHERS = {
    "watch()": {},
    "watch(clip=), nothing clipped": {"clip": 1e9},
    "watch(clip=), every step clipped": {"clip": 1e-3},
}


def measure_fixed_costs(say: Callable[[str], None], *, quick: bool) -> FixedCosts:
    """Measures all of them.

    Args:
        say: Prints a line of progress.
        quick: Whether to measure fewer steps.
    """
    say("counting ATen calls")
    calls = {
        name: (calls_added(10, **options), calls_added(MANY, **options))
        for name, options in WATCHERS.items()
    }
    numbers = {name: numbers_added(**options) for name, options in WATCHERS.items()}
    say("timing the import")
    import_s = import_seconds(1 if quick else 5)
    say(f"timing watch() on {MANY:,} small tensors")
    operators = operator_time(MANY, rounds=3 if quick else 5, turns=1 if quick else 3)
    last = MEMORY_TO[quick]
    say(f"watching {last:,} steps for memory")
    memory = memory_growth(MEMORY_FROM, last), last
    return FixedCosts(calls, numbers, memory, import_s, operators)


def import_seconds(times: int) -> float:
    """Times the import of gradwatch in processes of their own, the first one for nothing."""
    command = [sys.executable, "-c", IMPORT]
    run = partial(subprocess.run, command, check=True, capture_output=True, text=True)
    run()
    return statistics.median(float(run().stdout) for _ in range(times))


def memory_growth(first: int, last: int) -> int:
    """Watches a tiny training, and tells how many bytes the process grew by.

    Args:
        first: From which step on; the ring buffer of 1,024 steps is full by then.
        last: Up to which one.
    """
    x = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.0)
    start = 0
    with gradwatch.watch({"x": x}, optimizer, clip=1.0):
        for step in range(1, last + 1):
            x.sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == first:
                start = resident_bytes()
    return resident_bytes() - start

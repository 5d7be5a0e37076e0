"""Costs that do not depend on the model: counts, memory, import time, time in operators."""

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
    """The measured costs; None if one was not measured.

    Attributes:
        calls: By option of ``watch``, the ATen calls that it adds for 10 and for 10,000 tensors.
        numbers: By option, how often a number is read from a tensor on an accelerator's path.
        memory: Growth of the process in bytes since step 10,000, and the last step.
        import_s: Seconds of ``import gradwatch`` after ``import torch``.
        operators: Time of ``watch()`` on 10,000 small tensors.
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
    """Measures all fixed costs, with fewer steps and repetitions if ``quick``."""
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
    """Returns the median import time of gradwatch in new processes, after one to warm up."""
    command = [sys.executable, "-c", IMPORT]
    run = partial(subprocess.run, command, check=True, capture_output=True, text=True)
    run()
    return statistics.median(float(run().stdout) for _ in range(times))


def memory_growth(first: int, last: int) -> int:
    """Watches a tiny training, and returns by how many bytes the process grew between two steps.

    At the first of them, the ring buffer of 1,024 steps must be full.
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

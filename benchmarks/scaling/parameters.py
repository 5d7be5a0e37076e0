"""Measures the cost of watching by number of parameters, and of each statistic."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import gradwatch
from benchmarks.overhead.timing import TIMERS, InterleavedTiming
from benchmarks.overhead.variants import (
    EVERY_STEP_CLIPPED,
    MAX_NORMS,
    NOTHING_CLIPPED,
    Variant,
    bare,
    watched,
)
from benchmarks.overhead.workloads import narrow_training
from benchmarks.spread import Spread, spread
from gradwatch.measure.statistics import STATISTICS

OPTIONS: dict[str, dict[str, Any]] = {
    "watch()": {},
    "watch(clip=), nothing clipped": {"clip": MAX_NORMS[NOTHING_CLIPPED]},
    "watch(clip=), every step clipped": {"clip": MAX_NORMS[EVERY_STEP_CLIPPED]},
}


@dataclass(frozen=True)
class Size:
    """The cost for one number of parameters.

    Attributes:
        tensors: Number of parameters.
        bare_s: Seconds of a bare step.
        added_s: By option of ``watch``, the seconds that it adds to a step.
        memory: Bytes that the watcher holds, including the buffer of 1,024 steps.
    """

    tensors: int
    bare_s: float
    added_s: dict[str, Spread]
    memory: int


def sizes(counts: Sequence[int], rounds: int, say: Callable[[str], None]) -> list[Size]:
    """Measures the cost for several numbers of parameters, of 16 elements each."""
    found = []
    for tensors in counts:
        say(f"{tensors:,} tensors")
        bare_s, added_s = _added(tensors, OPTIONS, rounds)
        found.append(Size(tensors, bare_s, added_s, held_bytes(tensors)))
    return found


def statistics_added(tensors: int, rounds: int) -> dict[str, Spread]:
    """Measures what each statistic adds to a step, alone and all together.

    Returns:
        By statistic, seconds that ``watch(statistics=)`` adds to a bare step; ``norm`` is always
        measured.
    """
    options: dict[str, dict[str, Any]] = {
        name: {"statistics": ("norm", name)} for name in STATISTICS
    }
    options = {"norm": {}, **options, "all of them": {"statistics": tuple(STATISTICS)}}
    return _added(tensors, options, rounds)[1]


def held_bytes(tensors: int) -> int:
    """Counts the bytes that Python and NumPy hold for a watcher after some steps.

    The buffer is allocated as a whole, so a few steps are enough. Memory of PyTorch's tensors is
    not counted.
    """
    training = narrow_training(tensors)
    training.step()
    tracemalloc.start()
    try:
        with gradwatch.watch(training.model, training.optimizer):
            for _ in range(3):
                training.step()
            return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def _added(
    tensors: int, options: dict[str, dict[str, Any]], rounds: int
) -> tuple[float, dict[str, Spread]]:
    training = narrow_training(tensors)
    variants = [Variant(name, partial(watched, training, **some)) for name, some in options.items()]
    timing = InterleavedTiming(bare(training), variants, TIMERS["wall"], steps=5)
    timing.rehearse()
    measured = [timing.measure_round(3) for _ in range(rounds)]
    bare_s = spread([seconds for each in measured for seconds in each.bare]).middle
    added_s = {v.name: spread([each.added[v.key] for each in measured]) for v in variants}
    return bare_s, added_s

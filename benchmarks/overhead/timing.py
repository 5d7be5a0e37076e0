"""Time measurement: variants in turn, the time in a variant's own calls, and flushes to sinks."""

from __future__ import annotations

import itertools
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import torch

import gradwatch
from benchmarks.overhead.variants import (
    EVERY_STEP_CLIPPED,
    MAX_NORMS,
    Key,
    Step,
    Variant,
    sink_options,
)
from benchmarks.spread import Spread, spread
from gradwatch.record import recorder

BETWEEN = 2
"""The bare loop A has a turn after this many other variants: A B C A D B A ..."""

MOST_TURNS = 60

OWN_TIME_STEPS = 24
REAL_FLUSH_SECONDS = recorder.FLUSH_SECONDS  # the real value; the benchmark sets it to infinity

Timer = Callable[[Step, int], list[float]]  # runs a step n times; returns the seconds of each


def host_timer(clock: Callable[[], float]) -> Timer:
    """Makes a timer from a host clock."""

    def times(step: Step, number: int) -> list[float]:
        seconds = []
        for _ in range(number):
            start = clock()
            step()
            seconds.append(clock() - start)
        return seconds

    return times


def cuda_timer(step: Step, number: int) -> list[float]:
    """Times steps with CUDA events; waits for the GPU only after the last step."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(number + 1)]
    torch.cuda.synchronize()
    for event in events[:-1]:
        event.record()
        step()
    events[-1].record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]


TIMERS: dict[str, Timer] = {
    "wall": host_timer(time.perf_counter),
    "cpu": host_timer(time.process_time),
    "cuda": cuda_timer,
}


@dataclass
class Round:
    """The measurements of one round.

    Attributes:
        bare: For each turn of the bare loop, the median seconds per step.
        added: By variant, the seconds that it adds to a step, the median over its turns.
    """

    bare: list[float] = field(default_factory=list)
    added: dict[Key, float] = field(default_factory=dict)


def paired(mine: float, before: float, after: float) -> float:
    """Returns the difference between a turn and the bare loop's turns before and after it."""
    return mine - (before + after) / 2


class InterleavedTiming:
    """Times variants in turn, a few steps each, with turns of the bare loop between them.

    If the machine becomes slower meanwhile, that does not count as a cost of a variant.
    """

    def __init__(
        self, bare: Variant, variants: Sequence[Variant], timer: Timer, steps: int
    ) -> None:
        """Stores what to time; runs nothing yet.

        Args:
            bare: The bare loop.
            variants: All other variants.
            timer: Times the steps.
            steps: Number of timed steps per turn. One more step before them is not timed, because
                it pays for the change of variant.
        """
        self._bare, self._variants, self._timer, self._steps = bare, variants, timer, steps
        self._cost: dict[Key, float] = {}
        self._shuffle = random.Random(0).shuffle

    def rehearse(self) -> None:
        """Gives every variant one turn that is used only to plan the time."""
        for variant in (self._bare, self._bare, *self._variants):
            start = time.perf_counter()
            self._turn(variant)
            self._cost[variant.key] = time.perf_counter() - start

    def round_seconds(self, turns: int) -> float:
        """Returns the expected duration of a round in seconds.

        Args:
            turns: Number of turns of each precise variant; the others have one.
        """
        passes = [
            self._variants,
            *[[variant for variant in self._variants if variant.precise]] * (turns - 1),
        ]
        return sum(
            sum(self._cost[variant.key] for variant in some)
            + self._cost[self._bare.key] * (1 + -(-len(some) // BETWEEN))
            for some in passes
        )

    def fitting(self, seconds: float) -> int:
        """Returns how many turns fit into a round of this duration, at least 1."""
        each = self.round_seconds(2) - self.round_seconds(1)
        spare = seconds - self.round_seconds(1)
        return max(1, min(MOST_TURNS, 1 + int(spare / each))) if each > 0 else 1

    def measure_round(self, turns: int) -> Round:
        """Measures one round.

        Args:
            turns: Number of turns of each precise variant; the others have one.
        """
        result, differences = Round(), dict[Key, list[float]]()
        for number in range(turns):
            variants = [variant for variant in self._variants if variant.precise or number == 0]
            self._shuffle(variants)  # no variant should always follow the same one
            for key, seconds in self._pass(variants, result.bare):
                differences.setdefault(key, []).append(seconds)
        result.added = {key: statistics.median(each) for key, each in differences.items()}
        return result

    def _pass(self, variants: Sequence[Variant], bares: list[float]) -> Iterator[tuple[Key, float]]:
        before = self._turn(self._bare)
        bares.append(before)
        for first in range(0, len(variants), BETWEEN):
            some = [
                (variant.key, self._turn(variant)) for variant in variants[first : first + BETWEEN]
            ]
            after = self._turn(self._bare)
            bares.append(after)
            for key, seconds in some:
                yield key, paired(seconds, before, after)
            before = after

    def _turn(self, variant: Variant) -> float:
        with variant.prepare() as loop:
            loop.step()
            return statistics.median(self._timer(loop.step, self._steps))


def own_time(variant: Variant, steps: int = OWN_TIME_STEPS) -> Spread:
    """Measures the seconds per step that a variant spends in its own calls.

    The noise of the rest of the step does not affect this number. But it is not the whole cost of a
    variant: what it evicts from the caches slows down the rest of the step.

    Args:
        variant: Prepared here.
        steps: Number of steps to measure.

    Returns:
        Median and quartiles over the steps; NaN if the variant does not measure its own time.
    """
    each = []
    with variant.prepare() as loop:
        if loop.own_seconds is None:
            return spread([])
        for number in range(steps + 2):
            before = loop.own_seconds()
            loop.step()
            if number >= 2:  # the first two allocate what later ones reuse
                each.append(loop.own_seconds() - before)
    return spread(each)


@cache  # the settings of one workload have the same parameters
def flush_seconds(names: tuple[str, ...], sinks: tuple[str, ...], flushes: int) -> float:
    """Measures how much passing the records to the sinks adds to the step in which it happens.

    A flush only sees names and norms, so here each parameter has a single element.

    Args:
        names: Names of the parameters.
        sinks: The sinks that receive the records; empty if they only enter the buffer.
        flushes: Number of flushes to take the mean of; some of them merge what earlier ones wrote.

    Returns:
        Seconds for a batch of 64 steps, including the work of the background thread.
    """
    model = {name: torch.zeros(1, requires_grad=True) for name in names}
    tensors = list(model.values())
    optimizer = torch.optim.SGD(tensors, lr=0.0)
    limit = MAX_NORMS[EVERY_STEP_CLIPPED]
    ordinary, flushing = list[float](), list[float]()
    with tempfile.TemporaryDirectory() as folder:
        options = sink_options(sinks, folder)
        with no_flush_by_clock(), gradwatch.watch(model, optimizer, clip=limit, **options):
            # The first flush opens the files; it is left out of the mean.
            for step in range(1, (flushes + 1) * recorder.FLUSH_STEPS + 1):
                optimizer.zero_grad()
                (torch.cat(tensors) * torch.randn(len(tensors))).sum().backward()
                start = time.perf_counter()
                optimizer.step()
                seconds = time.perf_counter() - start
                due = step % recorder.FLUSH_STEPS == 0
                (flushing if due else ordinary).append(seconds)
    return max(0.0, statistics.fmean(flushing[1:]) - statistics.median(ordinary))


@contextmanager
def no_flush_by_clock() -> Iterator[None]:
    """Prevents flushes by the clock during a turn, because flushes are timed separately."""
    before, recorder.FLUSH_SECONDS = recorder.FLUSH_SECONDS, math.inf
    try:
        yield
    finally:
        recorder.FLUSH_SECONDS = before


def steps_per_flush(step_s: float) -> float:
    """Returns how many steps share a flush: 64, or as many as fit into 5 seconds."""
    return min(float(recorder.FLUSH_STEPS), max(1.0, REAL_FLUSH_SECONDS / step_s))

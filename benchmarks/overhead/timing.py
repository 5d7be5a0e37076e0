"""How time is measured: variants in turn, a variant's own calls, and the flush to the sinks."""

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
"""The bare loop has its turn after so many others: A B C A D B A ..."""

MOST_TURNS = 60

OWN_TIME_STEPS = 24
REAL_FLUSH_SECONDS = recorder.FLUSH_SECONDS  # as users have it; benchmarks stretch it

Timer = Callable[[Step, int], list[float]]  # seconds of each of so many steps


def host_timer(clock: Callable[[], float]) -> Timer:
    """Makes a timer of a clock of the host."""

    def times(step: Step, number: int) -> list[float]:
        seconds = []
        for _ in range(number):
            start = clock()
            step()
            seconds.append(clock() - start)
        return seconds

    return times


def cuda_timer(step: Step, number: int) -> list[float]:
    """Times steps by events on the GPU, which is waited for only at the end of them all."""
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
    """What one round has measured.

    Attributes:
        bare: Seconds of a step of the bare loop, the median of each of its turns.
        added: By variant, the median over its turns of the seconds that it adds to a step.
    """

    bare: list[float] = field(default_factory=list)
    added: dict[Key, float] = field(default_factory=dict)


def paired(mine: float, before: float, after: float) -> float:
    """Returns what a turn took more than the turns of the bare loop on both sides of it."""
    return mine - (before + after) / 2


class InterleavedTiming:
    """Times variants in turn, a few steps each, with turns of the bare loop between them.

    A machine that becomes slower meanwhile then is no cost of a variant.
    """

    def __init__(
        self, bare: Variant, variants: Sequence[Variant], timer: Timer, steps: int
    ) -> None:
        """Notes what to time; nothing runs yet.

        Args:
            bare: The bare loop.
            variants: All others.
            timer: What times the steps.
            steps: Timed steps in a turn. One more, before them, pays for the change.
        """
        self._bare, self._variants, self._timer, self._steps = bare, variants, timer, steps
        self._cost: dict[Key, float] = {}
        self._shuffle = random.Random(0).shuffle

    def rehearse(self) -> None:
        """Lets every variant have a turn that counts for nothing but for the plan."""
        for variant in (self._bare, self._bare, *self._variants):
            start = time.perf_counter()
            self._turn(variant)
            self._cost[variant.key] = time.perf_counter() - start

    def round_seconds(self, turns: int) -> float:
        """Returns what a round will take.

        Args:
            turns: How many turns each of the precise variants has; the others have one.
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
        """Returns how many turns fit into a round of so many seconds, at least 1."""
        each = self.round_seconds(2) - self.round_seconds(1)
        spare = seconds - self.round_seconds(1)
        return max(1, min(MOST_TURNS, 1 + int(spare / each))) if each > 0 else 1

    def measure_round(self, turns: int) -> Round:
        """Measures one round.

        Args:
            turns: How many turns each of the precise variants has; the others have one.
        """
        result, differences = Round(), dict[Key, list[float]]()
        for number in range(turns):
            variants = [variant for variant in self._variants if variant.precise or number == 0]
            self._shuffle(variants)  # nobody always follows the same neighbour
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
    """Measures the seconds of a step that a variant spends within its own calls.

    No noise of the step around them blurs these. They are not all that the variant costs: what it
    throws out of the caches, the step misses elsewhere.

    Args:
        variant: The variant.
        steps: How many to measure.

    Returns:
        Median and quartiles over some steps; of nothing where the variant cannot tell.
    """
    each = []
    with variant.prepare() as loop:
        if loop.own_seconds is None:
            return spread([])
        for number in range(steps + 2):
            before = loop.own_seconds()
            loop.step()
            if number >= 2:  # the first ones make what is kept
                each.append(loop.own_seconds() - before)
    return spread(each)


@cache  # the settings of one workload have the same parameters
def flush_seconds(names: tuple[str, ...], sinks: tuple[str, ...], flushes: int) -> float:
    """Measures what handing the records to the sinks adds to the step that it falls into.

    A flush knows a parameter by its name and its norms only, so the parameters are of one
    element each here.

    Args:
        names: Names of the parameters.
        sinks: Which sinks get it; none where the records just enter the buffer.
        flushes: How many to take the mean of: now and then one merges what earlier ones wrote.

    Returns:
        Seconds for a batch of 64 steps, the background thread's work included.
    """
    model = {name: torch.zeros(1, requires_grad=True) for name in names}
    tensors = list(model.values())
    optimizer = torch.optim.SGD(tensors, lr=0.0)
    limit = MAX_NORMS[EVERY_STEP_CLIPPED]
    ordinary, flushing = list[float](), list[float]()
    with tempfile.TemporaryDirectory() as folder:
        options = sink_options(sinks, folder)
        with no_flush_by_clock(), gradwatch.watch(model, optimizer, clip=limit, **options):
            # The first one opens the files, once in a run.
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
    """Keeps the clock from starting a flush inside of a turn: they are timed by themselves."""
    before, recorder.FLUSH_SECONDS = recorder.FLUSH_SECONDS, math.inf
    try:
        yield
    finally:
        recorder.FLUSH_SECONDS = before


def steps_per_flush(step_s: float) -> float:
    """Returns how many steps share a flush: 64, or those of 5 seconds.

    Args:
        step_s: Seconds of a step.
    """
    return min(float(recorder.FLUSH_STEPS), max(1.0, REAL_FLUSH_SECONDS / step_s))

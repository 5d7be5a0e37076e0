"""Turns: lets the ways of a setting train in turn, the bare loop between them."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from _overhead_spread import paired
from _overhead_ways import Step, Way

BETWEEN = 2
"""The bare loop has its turn after so many others: A B C A D B A ..."""

MOST_TURNS = 60

Key = tuple[str, str]
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
        added: By way, the median over its turns of the seconds that it adds to a step.
    """

    bare: list[float] = field(default_factory=list)
    added: dict[Key, float] = field(default_factory=dict)


class Turns:
    """The turns of one setting."""

    def __init__(self, bare: Way, ways: Sequence[Way], timer: Timer, steps: int) -> None:
        """Takes the ways; nothing runs yet.

        Args:
            bare: The bare loop.
            ways: All others.
            timer: What times the steps.
            steps: Timed steps in a turn. One more, before them, pays for the change.
        """
        self._bare, self._ways, self._timer, self._steps = bare, ways, timer, steps
        self._cost: dict[Key, float] = {}
        self._shuffle = random.Random(0).shuffle

    def rehearse(self) -> None:
        """Lets every way have a turn that counts for nothing but for the plan."""
        for way in (self._bare, self._bare, *self._ways):
            start = time.perf_counter()
            self._turn(way)
            self._cost[way.key] = time.perf_counter() - start

    def round_seconds(self, turns: int) -> float:
        """Returns what a round will take.

        Args:
            turns: How many turns each of the precise ways has; the others have one.
        """
        passes = [self._ways, *[[way for way in self._ways if way.precise]] * (turns - 1)]
        return sum(
            sum(self._cost[way.key] for way in some)
            + self._cost[self._bare.key] * (1 + -(-len(some) // BETWEEN))
            for some in passes
        )

    def fitting(self, seconds: float) -> int:
        """Returns how many turns fit into a round of so many seconds, at least 1."""
        each = self.round_seconds(2) - self.round_seconds(1)
        spare = seconds - self.round_seconds(1)
        return max(1, min(MOST_TURNS, 1 + int(spare / each))) if each > 0 else 1

    def round(self, turns: int) -> Round:
        """Measures one round.

        Args:
            turns: How many turns each of the precise ways has; the others have one.
        """
        result, differences = Round(), dict[Key, list[float]]()
        for number in range(turns):
            ways = [way for way in self._ways if way.precise or number == 0]
            self._shuffle(ways)  # nobody always follows the same neighbour
            for key, seconds in self._pass(ways, result.bare):
                differences.setdefault(key, []).append(seconds)
        result.added = {key: statistics.median(each) for key, each in differences.items()}
        return result

    def _pass(self, ways: Sequence[Way], bares: list[float]) -> Iterator[tuple[Key, float]]:
        before = self._turn(self._bare)
        bares.append(before)
        for first in range(0, len(ways), BETWEEN):
            some = [(way.key, self._turn(way)) for way in ways[first : first + BETWEEN]]
            after = self._turn(self._bare)
            bares.append(after)
            for key, seconds in some:
                yield key, paired(seconds, before, after)
            before = after

    def _turn(self, way: Way) -> float:
        with way.lend() as step:
            step()
            return statistics.median(self._timer(step, self._steps))

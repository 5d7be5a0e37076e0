"""What watching costs as parameters become more, and as statistics are added."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from _overhead_outside import narrow_training
from _overhead_spread import Spread, spread
from _overhead_turns import TIMERS, Turns
from _overhead_ways import LIMITS, Way, bare, watched

import gradwatch
from gradwatch.observe.statistics import STATISTICS

UNTOUCHED, CLIPPED = LIMITS
OPTIONS: dict[str, dict[str, Any]] = {
    "watch()": {},
    "watch(clip=), nothing clipped": {"clip": LIMITS[UNTOUCHED]},
    "watch(clip=), every step clipped": {"clip": LIMITS[CLIPPED]},
}


@dataclass(frozen=True)
class Size:
    """A number of parameters.

    Attributes:
        tensors: How many.
        bare_s: Seconds of a bare step.
        added_s: By what the watcher does, the seconds that it adds to a step.
        memory: Bytes that the watcher holds, the buffer of 1,024 steps included.
    """

    tensors: int
    bare_s: float
    added_s: dict[str, Spread]
    memory: int


def sizes(counts: Sequence[int], rounds: int, say: Callable[[str], None]) -> list[Size]:
    """Measures several numbers of parameters, of 16 elements each.

    Args:
        counts: How many tensors.
        rounds: Rounds to take the median of.
        say: Prints a line of progress.
    """
    found = []
    for tensors in counts:
        say(f"{tensors:,} tensors")
        bare_s, added_s = _added(tensors, OPTIONS, rounds)
        found.append(Size(tensors, bare_s, added_s, held_bytes(tensors)))
    return found


def statistics_added(tensors: int, rounds: int) -> dict[str, Spread]:
    """Measures what each statistic adds to a step, alone and all together.

    Args:
        tensors: How many tensors.
        rounds: Rounds to take the median of.

    Returns:
        By statistic, what ``watch(statistics=)`` adds to a bare step; ``norm`` is always taken.
    """
    options: dict[str, dict[str, Any]] = {
        name: {"statistics": ("norm", name)} for name in STATISTICS if name != "norm"
    }
    options = {"norm": {}, **options, "all of them": {"statistics": STATISTICS}}
    return _added(tensors, options, rounds)[1]


def held_bytes(tensors: int) -> int:
    """Counts the bytes that Python and NumPy hold for a watcher after some steps.

    The buffer is reserved as a whole, so that a few steps are enough; what PyTorch holds for its
    tensors is not among them.

    Args:
        tensors: How many tensors.
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
    ways = [Way(name, partial(watched, training, **some)) for name, some in options.items()]
    turns = Turns(bare(training), ways, TIMERS["wall"], steps=5)
    turns.rehearse()
    measured = [turns.round(3) for _ in range(rounds)]
    bare_s = spread([seconds for each in measured for seconds in each.bare]).middle
    return bare_s, {way.name: spread([each.added[way.key] for each in measured]) for way in ways}

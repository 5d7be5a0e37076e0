"""Within: what a way spends inside of its own calls, which no noise of the step around it blurs.

That is not all that it costs: what it throws out of the caches, the step misses elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from _overhead_spread import Spread, spread

if TYPE_CHECKING:
    from _overhead_ways import Way

STEPS = 24


@dataclass
class Meter:
    """Reads the seconds that the way whose turn it is has spent within its own calls so far.

    Attributes:
        read: Reads them; None where the way cannot tell.
    """

    read: Callable[[], float] | None = None


METER = Meter()


def metered(call: Callable[[], object]) -> Callable[[], None]:
    """Wraps a call so that the meter can read its seconds from now on.

    Args:
        call: What the way does.
    """
    seconds = 0.0

    def timed() -> None:
        nonlocal seconds
        start = time.perf_counter()
        call()
        seconds += time.perf_counter() - start

    METER.read = lambda: seconds
    return timed


def within(way: Way, steps: int = STEPS) -> Spread:
    """Measures the seconds of a step that a way spends within its own calls.

    Args:
        way: The way.
        steps: How many to measure.

    Returns:
        Median and quartiles over some steps; of nothing where the way cannot tell.
    """
    METER.read = None
    each = []
    with way.lend() as step:
        if METER.read is None:
            return spread([])
        for number in range(steps + 2):
            before = METER.read()
            step()
            if number >= 2:  # the first ones make what is kept
                each.append(METER.read() - before)
    return spread(each)

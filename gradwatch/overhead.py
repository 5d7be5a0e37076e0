"""Overhead: what gradwatch itself costs, measured while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from operator import setitem
from typing import NamedTuple

_CALIBRATION_CALLS = 2_000


class Overhead(NamedTuple):
    """The time that gradwatch took.

    Attributes:
        seconds: Time in gradwatch's own code and the tensor operations that it started; the marks
            that parameters leave in a backward are counted with a calibrated time each.
        share: The same as a share of the wall time since the watcher was attached.
    """

    seconds: float
    share: float


class Stopwatch:
    """Adds up the time of gradwatch's entries into the training.

    Attributes:
        busy: Seconds of all entries so far.
        arrivals: Marks that parameters have left so far.
    """

    def __init__(self) -> None:
        """Starts at zero."""
        self.busy = 0.0
        self.arrivals = 0
        self._mark_s = _mark_seconds()
        self._started = time.perf_counter()
        self._stopped: float | None = None

    def start(self) -> None:
        """Sets the beginning of the wall time to now."""
        self._started = time.perf_counter()

    def elapsed(self) -> float:
        """Returns the seconds since the start, until :meth:`stop`."""
        end = time.perf_counter() if self._stopped is None else self._stopped
        return end - self._started

    def stop(self) -> None:
        """Ends the measurement; safe to call again."""
        if self._stopped is None:
            self._stopped = time.perf_counter()

    def read(self) -> Overhead:
        """Returns what was measured so far."""
        seconds = self.busy + self.arrivals * self._mark_s
        return Overhead(seconds, seconds / max(self.elapsed(), 1e-9))


def _mark_seconds() -> float:
    """Times one arrival mark, called from Python; the engine's own call costs a little more."""
    marks: dict[int, object] = {}
    mark: Callable[[object], None] = partial(setitem, marks, 0)
    start = time.perf_counter()
    for _ in range(_CALIBRATION_CALLS):
        mark(None)
    return (time.perf_counter() - start) / _CALIBRATION_CALLS

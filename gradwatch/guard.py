"""Keeps the errors of gradwatch, and the time that it takes, apart from the training."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from operator import setitem
from types import TracebackType
from typing import NamedTuple

import torch

from gradwatch.errors import AccumulationError, NonFiniteGradientError
from gradwatch.pickles import stable_name
from gradwatch.record.records import warn_safely

_CALIBRATION_CALLS = 2_000


@stable_name
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


UNSUPPORTED = "gradwatch stopped watching: {error} The training goes on untouched."

STOPPED = (
    "gradwatch stopped watching after an error of its own, {error}. The training goes on "
    "untouched; please report this."
)


class Shield:
    """Stands around gradwatch's code inside the training: ``with shield: ...``.

    Inside, no graph is recorded, and the time counts as gradwatch's own. No error gets out where
    gradwatch only watches; what follows the block is reached then, too. Where it acts (clips,
    skips, accumulates) an error must stop the run: going on without the clip would silently be
    another training.
    """

    __slots__ = ("_acts", "_entered", "_on_failure", "_recording", "_stopwatch")

    def __init__(self, acts: bool, on_failure: Callable[[], None], stopwatch: Stopwatch) -> None:
        """Starts whole.

        Args:
            acts: Whether gradwatch changes the training.
            on_failure: Called once when it must stop watching.
            stopwatch: Measures what gradwatch takes.
        """
        self._acts = acts
        self._on_failure = on_failure
        self._stopwatch = stopwatch
        self._entered = 0.0
        self._recording: list[bool] = []  # whether a graph was recorded before, block by block

    def __enter__(self) -> None:
        if not self._recording:
            self._entered = time.perf_counter()
        self._recording.append(torch.is_grad_enabled())
        torch._C._set_grad_enabled(False)  # torch.no_grad() costs ten calls

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        torch._C._set_grad_enabled(self._recording.pop())
        if not self._recording:
            self._stopwatch.busy += time.perf_counter() - self._entered
        return error is not None and self._holds_back(error)

    def _holds_back(self, error: BaseException) -> bool:
        meant = isinstance(error, (NonFiniteGradientError, AccumulationError))
        if meant or self._acts or not isinstance(error, Exception):
            return False
        self._on_failure()
        unsupported = isinstance(error, NotImplementedError)
        text = UNSUPPORTED if unsupported else STOPPED
        warn_safely(text.format(error=error if unsupported else _named(error)))
        return True


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"

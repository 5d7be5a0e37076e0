"""Separates gradwatch from the training: catches its errors, and measures the time it takes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from operator import setitem
from types import TracebackType
from typing import NamedTuple

import torch

from gradwatch.errors import (
    AccumulationError,
    ContractError,
    NonFiniteGradientError,
    described_error,
    is_of_device,
    logger,
    warn_safely,
)
from gradwatch.pickles import stable_name

_CALIBRATION_CALLS = 2_000


@stable_name
class Overhead(NamedTuple):
    """The time that gradwatch took.

    Attributes:
        seconds: Host time in gradwatch's own code and in the tensor operations that it started. The
            hooks that note the arrival of each gradient are included with a calibrated time each.
        share: The same, as a share of the wall time since the watcher was attached; 0 to 1.
    """

    seconds: float
    share: float


class Stopwatch:
    """Adds up the time that gradwatch's code takes inside the training.

    Attributes:
        busy: Seconds inside :class:`Shield` blocks so far.
        arrivals: The number of calls of arrival hooks so far.
    """

    def __init__(self) -> None:
        """Starts at zero."""
        self.busy = 0.0
        self.arrivals = 0
        self._mark_s = _mark_seconds()
        self._started = time.perf_counter()
        self._stopped: float | None = None

    def start(self) -> None:
        """Starts the wall time, again if it has been started before."""
        self._started = time.perf_counter()

    def elapsed(self) -> float:
        """Returns the seconds since the start, until :meth:`stop`."""
        end = time.perf_counter() if self._stopped is None else self._stopped
        return end - self._started

    def stop(self) -> None:
        """Stops the wall time; safe to call again."""
        if self._stopped is None:
            self._stopped = time.perf_counter()

    def read(self) -> Overhead:
        """Returns the overhead so far."""
        # Arrival hooks are C functions without a Python frame (hooks/backward.py). Timing each
        # call would cost far more than the call, so they are counted at a calibrated time.
        seconds = self.busy + self.arrivals * self._mark_s
        return Overhead(seconds, seconds / max(self.elapsed(), 1e-9))


def _mark_seconds() -> float:
    """Measures the time of one arrival hook; called by the autograd engine it takes a bit more."""
    marks: dict[int, object] = {}
    mark: Callable[[object], None] = partial(setitem, marks, 0)
    start = time.perf_counter()
    for _ in range(_CALIBRATION_CALLS):
        mark(None)
    return (time.perf_counter() - start) / _CALIBRATION_CALLS


UNSUPPORTED = "gradwatch stopped watching: {error} {rest}"

STOPPED = (
    "gradwatch stopped watching after an error of its own, {error}. {rest} Please report this."
)

OF_DEVICE = "gradwatch stopped watching, as the device has failed, with {error}."

UNTOUCHED = "The training goes on untouched."


class _Blocks(threading.local):
    """The blocks that a thread is in: another one may train another model, or step for it.

    Attributes:
        recording: The grad mode, which each thread has for itself, before each of the blocks.
        entered: When the outermost one began.
    """

    def __init__(self) -> None:
        self.recording: list[bool] = []
        self.entered = 0.0


class Shield:
    """Wraps gradwatch's code inside the training: ``with shield: ...``.

    Inside the block no autograd graph is recorded, and the time counts as gradwatch's own. If
    gradwatch only watches, an error is turned into a warning, watching stops, and the code after
    the block runs. If it acts (clips, skips, accumulates), the error stops the run: to go on
    without the clip would silently be a different training.
    """

    __slots__ = ("_acts", "_blocks", "_on_failure", "_stopwatch")

    def __init__(self, acts: bool, on_failure: Callable[[str], str], stopwatch: Stopwatch) -> None:
        """Starts outside of any block.

        Args:
            acts: Whether gradwatch changes the training, so that errors must not be suppressed.
            on_failure: Stops watching; called when an error is suppressed, with its description.
                Returns a sentence that says what becomes of the training.
            stopwatch: Receives the time spent in the blocks.
        """
        self._acts = acts
        self._on_failure = on_failure
        self._stopwatch = stopwatch
        self._blocks = _Blocks()

    def __enter__(self) -> None:
        # Blocks may nest. Only the outermost is timed, so that no time counts twice.
        blocks = self._blocks
        if not blocks.recording:
            blocks.entered = time.perf_counter()
        blocks.recording.append(torch.is_grad_enabled())
        # What torch.no_grad() does, without the ten Python calls that it takes: this code runs
        # several times in every step.
        torch._C._set_grad_enabled(False)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        blocks = self._blocks
        torch._C._set_grad_enabled(blocks.recording.pop())
        if not blocks.recording:
            self._stopwatch.busy += time.perf_counter() - blocks.entered
        return error is not None and self._holds_back(error)

    def _holds_back(self, error: BaseException) -> bool:
        # The first two are not failures of gradwatch, but tell the user about the training. A
        # KeyboardInterrupt, which is not an Exception, must always get through.
        meant = isinstance(error, (NonFiniteGradientError, AccumulationError))
        if meant or self._acts or not isinstance(error, Exception):
            return False
        rest = self._on_failure(described_error(error))
        # NotImplementedError is how gradwatch refuses a set-up that it does not support, and an
        # object of the user's that breaks its contract is no error of gradwatch either.
        unsupported = isinstance(error, (NotImplementedError, ContractError))
        # The training's own next call to the device fails as well.
        failed = OF_DEVICE if is_of_device(error) else STOPPED
        text = UNSUPPORTED if unsupported else failed
        text = text.format(error=error if unsupported else described_error(error), rest=rest)
        warn_safely(text)
        logger.warning(text)
        return True

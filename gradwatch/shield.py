"""Shield: keeps a failure of gradwatch away from a training that it only watches."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

import torch

from gradwatch.errors import AccumulationError, NonFiniteGradientError
from gradwatch.overhead import Stopwatch
from gradwatch.record.sinks import warn_safely

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

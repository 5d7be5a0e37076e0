"""Shield: keeps a failure of gradwatch away from a training that it only watches."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch.optim import Optimizer

from gradwatch.control.boundary import StepListener
from gradwatch.errors import AccumulationError, NonFiniteGradientError
from gradwatch.record.sinks import warn_safely

T = TypeVar("T")

UNSUPPORTED = "gradwatch stopped watching: {error} The training goes on untouched."

STOPPED = (
    "gradwatch stopped watching after an error of its own, {error}. The training goes on "
    "untouched; please report this."
)


class Shield:
    """Runs gradwatch's code inside the training.

    Where gradwatch acts (clips, skips, accumulates) an error must stop the run: going on without
    the clip would silently be another training.
    """

    def __init__(self, acts: bool, on_failure: Callable[[], None]) -> None:
        """Starts whole.

        Args:
            acts: Whether gradwatch changes the training.
            on_failure: Called once when it must stop watching.
        """
        self._acts = acts
        self._on_failure = on_failure

    def run(self, call: Callable[[], T], otherwise: T) -> T:
        """Runs a piece of gradwatch.

        Args:
            call: The piece.
            otherwise: What stands for its result where it failed.

        Returns:
            The result.
        """
        try:
            return call()
        except (NonFiniteGradientError, AccumulationError):
            raise
        except Exception as error:
            if self._acts:
                raise
            self._on_failure()
            unsupported = isinstance(error, NotImplementedError)
            text = UNSUPPORTED if unsupported else STOPPED
            warn_safely(text.format(error=error if unsupported else _named(error)))
            return otherwise


class ShieldedListener:
    """Stands between a step boundary and its listener."""

    def __init__(self, listener: StepListener, shield: Shield) -> None:
        """Passes everything on.

        Args:
            listener: Who listens.
            shield: What stands in front of it.
        """
        self._listener = listener
        self._shield = shield

    def begin(self, optimizer: Optimizer, has_closure: bool) -> None:
        """A step begins."""
        self._shield.run(lambda: self._listener.begin(optimizer, has_closure), None)

    def settle(self, optimizer: Optimizer, loss: object) -> bool:
        """The gradients stand; where the listener fails the step is taken."""
        return self._shield.run(lambda: self._listener.settle(optimizer, loss), True)

    def finish(self, optimizer: Optimizer) -> None:
        """The step is over."""
        self._shield.run(lambda: self._listener.finish(optimizer), None)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"

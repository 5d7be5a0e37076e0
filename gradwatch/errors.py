"""The exceptions and the warning of gradwatch."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from gradwatch.pickles import stable_name

if TYPE_CHECKING:
    from gradwatch.record.explanation import Explanation

logger = logging.getLogger("gradwatch")


@stable_name
class NonFiniteGradientError(RuntimeError):
    """A gradient contained a NaN or an Inf, and ``on_nonfinite="raise"`` was set.

    Weights and optimizer state are as before the step, unless the message says otherwise.

    Attributes:
        step: The optimizer step that was not taken, counted from 1.
        micro_batch: The micro-batch of the step in which it was first seen, counted from 1.
        parameter: The name of the first parameter, in backward order, with such a gradient.
        nan_count: The number of NaN elements in that gradient.
        inf_count: The number of Inf elements in that gradient.
        explanation: Where it came from, with ``explain=True``; else None.
    """

    def __init__(
        self,
        message: str,
        *,
        step: int = 0,
        micro_batch: int = 0,
        parameter: str = "",
        nan_count: int = 0,
        inf_count: int = 0,
    ) -> None:
        super().__init__(message)
        self.step = step
        self.micro_batch = micro_batch
        self.parameter = parameter
        self.nan_count = nan_count
        self.inf_count = inf_count
        self.explanation: Explanation | None = None

    def explained(self, explanation: Explanation | None) -> NonFiniteGradientError:
        """Returns this error, with an explanation that its text tells, too; None for none."""
        if explanation is not None:
            self.explanation = explanation
            self.args = (f"{self}\n\n{explanation}",)
        return self


@stable_name
class AccumulationError(RuntimeError):
    """A step or a backward does not fit the number of micro-batches set by ``accumulate=``."""


class ContractError(TypeError):
    """An object of the user's (a policy, a sink) does not do what its interface asks for."""


@stable_name
class GradwatchWarning(UserWarning):
    """Something in gradwatch failed or was left out; the training itself is untouched."""


class _Listener(logging.Handler):
    """Hands on what is logged, in the place of the handlers of the program."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self.say = say

    def emit(self, record: logging.LogRecord) -> None:
        self.say(record.getMessage())


def tell_instead(say: Callable[[str], None]) -> None:
    """Has warnings and log lines told to a function, in a program that shall print what it did.

    ``say`` must not raise.
    """
    logger.addHandler(_Listener(say))
    logger.propagate = False


def tell_no_more(say: Callable[[str], None]) -> None:
    """Ends :func:`tell_instead`; safe to call again."""
    for one in _listeners():
        if one.say == say:
            logger.removeHandler(one)
    logger.propagate = not _listeners()


def _listeners() -> list[_Listener]:
    return [one for one in logger.handlers if isinstance(one, _Listener)]


def warn_safely(message: str) -> None:
    """Warns, or logs where the user's filters turn warnings into errors: never raises."""
    if listeners := _listeners():
        listeners[-1].say(message)
        return
    try:
        warnings.warn(message, GradwatchWarning, stacklevel=3)
    except Exception:
        logger.warning(message)


def is_of_device(error: BaseException) -> bool:
    """Returns whether an error says that a device has failed, as after an assertion in a kernel.

    Every later call to the device raises it again.
    """
    if type(error).__name__ == "AcceleratorError":  # torch 2.8 and later
        return True
    return isinstance(error, RuntimeError) and bool(_OF_DEVICE.search(str(error)))


_OF_DEVICE = re.compile(r"\b[A-Z]{2,5} error: |device-side assert")


def described_error(error: BaseException) -> str:
    """Describes an error by its class and message; never raises, whatever its ``__str__`` does."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__

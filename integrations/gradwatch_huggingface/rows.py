"""Rows: what the rows get that a Trainer logs about its training."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from gradwatch import RecordBatch, StepRecord
from gradwatch.adapters import LoggerScalars, warn_safely

HIDDEN = (
    "gradwatch: the loss of step %d is not finite, and the Trainer's log does not show it: with "
    "TrainingArguments(logging_nan_inf_filter=True), its default, the mean of the losses since the "
    "row before stands in its place, which is 0 with logging_steps=1. The column loss of the "
    "callback's history has the real one."
)
NOT_LOGGED = (
    "GradientMonitorCallback logs nothing any more in this training, because of {kind}: {error} "
    "Its history goes on. Turn its logging off: GradientMonitorCallback(log=False)."
)
logger = logging.getLogger("gradwatch")


class ComingStep(Protocol):
    """A step that is over; see :meth:`gradwatch.Watcher.on_each_step`."""

    def arrived(self) -> bool:
        """Returns whether the record can be read without waiting."""

    def batch(self) -> RecordBatch | None:
        """Returns the step as a batch; None if there was none."""


class Rows:
    """Puts the newest step of each optimizer into the rows that the Trainer logs."""

    def __init__(self, trainer: Any, scalars: LoggerScalars, sampled: Iterable[str]) -> None:
        """Starts without a step.

        Args:
            trainer: The Trainer.
            scalars: Makes the numbers.
            sampled: Statistics that are not taken in every step; the rows get the newest sample.
        """
        self._trainer, self._scalars = trainer, scalars
        self._sampled = tuple(f"_{name}" for name in sampled)
        self._coming: deque[ComingStep] = deque()
        self._newest: dict[str, dict[str, float]] = {}
        self._hides = bool(getattr(trainer.args, "logging_nan_inf_filter", False))
        self._failed = False

    def expect(self, step: ComingStep) -> None:
        """Notes a step that is over."""
        self._coming.append(step)

    def read(self, wait: bool) -> None:
        """Reads the steps whose numbers have arrived, and with ``wait`` those that have not."""
        try:
            while self._coming and (wait or self._coming[0].arrived()):
                batch = self._coming.popleft().batch()
                for record, values in self._scalars.rows(batch) if batch is not None else ():
                    older = self._newest.get(record.optimizer, {})
                    self._newest[record.optimizer] = self._samples(older) | values
                    self._hint(record)
        except Exception as error:  # of the device, say; the watcher tells of it at its end
            self._fail(error)

    def log(self, original: Callable[..., Any], logs: Any, *args: Any, **kwargs: Any) -> Any:
        """Logs a row of the Trainer with our numbers in it, if it is one of its training."""
        # Those of an evaluation and of the end have no loss, and what the user's code logs by
        # itself comes at other times. The Trainer has waited for its loss already.
        if "loss" in logs and self._trainer.control.should_log and not self._failed:
            self.read(wait=True)
            ours = {tag: value for one in self._newest.values() for tag, value in one.items()}
            self._newest = {}
            logs.update(ours)
        return original(logs, *args, **kwargs)

    def _samples(self, values: dict[str, float]) -> dict[str, float]:
        groups = {tag: tag.partition("/")[0] for tag in values} if self._sampled else {}
        return {tag: values[tag] for tag in groups if groups[tag].endswith(self._sampled)}

    def _hint(self, record: StepRecord) -> None:
        if self._hides and record.nonfinite_parameters and not math.isfinite(record.loss):
            self._hides = False
            logger.warning(HIDDEN, record.global_step)

    def _fail(self, error: Exception) -> None:
        if not self._failed:
            self._failed = True
            warn_safely(NOT_LOGGED.format(kind=type(error).__name__, error=error))

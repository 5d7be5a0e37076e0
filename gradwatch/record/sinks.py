"""Sink: where records go; the protocol, and the warning that stands for a failure of ours."""

from __future__ import annotations

import logging
import warnings
from typing import Protocol, runtime_checkable

from gradwatch.record.batch import RecordBatch

logger = logging.getLogger("gradwatch")


class GradwatchWarning(UserWarning):
    """Something in gradwatch failed or was left out; the training itself is untouched."""


@runtime_checkable
class Sink(Protocol):
    """Anything that takes batches of records: a file, a logger, TensorBoard, a list."""

    def write(self, batch: RecordBatch) -> None:
        """Takes some consecutive steps, oldest first, and their events.

        Args:
            batch: The records. A sink keeps no reference to the arrays that it changes itself.
        """

    def close(self) -> None:
        """Writes what is still held and releases files; called once, at the end."""


def warn_safely(message: str) -> None:
    """Warns, or logs where the user's filters turn warnings into errors: never raises.

    Args:
        message: One sentence that says what failed and what it means for the run.
    """
    try:
        warnings.warn(message, GradwatchWarning, stacklevel=3)
    except Exception:
        logger.warning(message)

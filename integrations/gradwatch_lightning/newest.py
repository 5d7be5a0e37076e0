"""NewestSteps: what is to be logged of the newest step of each optimizer."""

from __future__ import annotations

from typing import Protocol

from gradwatch import RecordBatch, StepRecord
from gradwatch.adapters import BlockScalars, LoggerScalars, group_of


class ComingStep(Protocol):
    """A step that is over; see :meth:`gradwatch.Watcher.on_each_step`."""

    def arrived(self) -> bool:
        """Returns whether the record can be read without waiting."""

    def record(self) -> StepRecord | None:
        """Returns the record; None if there was no step."""

    def batch(self) -> RecordBatch | None:
        """Returns the record with the norms of all parameters; None if there was no step."""


class NewestSteps:
    """The newest step of each optimizer, since the loggers were last written to.

    Attributes:
        norm: The newest norm of the first optimizer; None before its first step.
    """

    def __init__(self, *, blocks: bool, accumulates: bool) -> None:
        """Starts without a step.

        Args:
            blocks: Whether the norms and the statistics of module blocks are logged.
            accumulates: As for :class:`~gradwatch.adapters.LoggerScalars`.
        """
        self.norm: float | None = None
        self._first = ""
        self._blocks = blocks
        self._scalars = LoggerScalars(accumulates=accumulates, blocks=blocks)
        self._statistics = BlockScalars(norms=False, statistics=True)
        self._values: dict[str, dict[str, float]] = {}
        self._sampled: dict[str, float] = {}

    def keep(self, step: ComingStep) -> None:
        """Takes a step whose numbers have arrived in place of the one before."""
        try:
            if self._blocks:
                self._keep_blocks(step.batch())
            elif (record := step.record()) is not None:
                self._keep_values(record, self._scalars.of(record))
        except Exception:  # an error of the device, which the watcher tells of when it is closed
            return

    def taken(self) -> dict[str, float]:
        """Returns the values by tag, and forgets them; empty if no optimizer has stepped."""
        values = {tag: value for one in self._values.values() for tag, value in one.items()}
        values |= self._sampled
        self._values, self._sampled = {}, {}
        return values

    def _keep_blocks(self, batch: RecordBatch | None) -> None:
        if batch is None:
            return
        for record, values in self._scalars.rows(batch):
            self._keep_values(record, values)
        # Taken every so many steps, which need not be those that are logged: the newest one counts.
        for record, of_blocks in zip(batch.steps, self._statistics.of(batch), strict=True):
            group = group_of(record.optimizer, self._first)
            self._sampled |= {f"{group}_{name}": value for name, value in of_blocks.items()}

    def _keep_values(self, record: StepRecord, values: dict[str, float]) -> None:
        self._first = self._first or record.optimizer
        if record.optimizer == self._first:
            self.norm = record.grad_norm
        self._values[record.optimizer] = values

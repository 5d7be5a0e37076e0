"""KeptRecords: what a copy of a watcher holds of its records; nothing is added any more."""

from __future__ import annotations

from dataclasses import dataclass

from gradwatch.record.records import Event, RecordBatch, StepRecord


@dataclass(frozen=True)
class KeptRecords:
    """Answers as a :class:`~gradwatch.record.recorder.Recorder` did at one moment.

    Attributes:
        kept: All steps that were in memory, held backwards included, and all events.
        newest: The newest step whose numbers had arrived; None before the first.
        skipped: The number of steps that were not applied.
    """

    kept: RecordBatch
    newest: StepRecord | None
    skipped: int

    @property
    def last(self) -> StepRecord | None:
        """The newest step; None before the first."""
        return self.kept.steps[-1] if self.kept.steps else None

    def batch(self) -> RecordBatch:
        """Returns all steps and events."""
        return self.kept

    def events(self) -> tuple[Event, ...]:
        """Returns all events, oldest first."""
        return tuple(self.kept.events)

    def receive(self, wait: bool = False) -> None:
        """Does nothing: all numbers are here."""

    def flush(self) -> None:
        """Does nothing: a copy has no sinks."""

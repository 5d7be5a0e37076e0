"""The steps and events of a batch in the order in which they happened."""

from __future__ import annotations

from collections.abc import Iterator

from gradwatch import Event, RecordBatch, StepRecord


def in_order(batch: RecordBatch) -> Iterator[Event | StepRecord]:
    """Yields steps and events, oldest first; events come before the step that they belong to."""
    waiting = list(batch.events)
    for record in batch.steps:
        before = [one for one in waiting if _is_of(one, record)]
        yield from before
        waiting = [one for one in waiting if one not in before] if before else waiting
        yield record
    yield from waiting  # of a step that is still to come


def _is_of(event: Event, record: StepRecord) -> bool:
    return event.optimizer == record.optimizer and event.step <= record.step

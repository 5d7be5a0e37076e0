"""Source: where a History reads from; the protocol, and the live one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from gradwatch.record.batch import NO_GRADIENT, Layout, RecordBatch
from gradwatch.record.columns import NORM_COLUMNS, Column, Labels, Span, Table, step_table
from gradwatch.record.event import Event


class Source(Protocol):
    """Records that can be read by columns and by ranges of steps, oldest first."""

    def layout(self) -> Layout:
        """Returns the parameters."""

    def statistics(self) -> tuple[str, ...]:
        """Returns the names of the further statistics per parameter."""

    def steps(self, columns: Iterable[str], span: Span) -> Table:
        """Reads steps.

        Args:
            columns: Fields of :class:`~gradwatch.record.step.StepRecord`.
            span: Which steps.

        Returns:
            The columns, one row per step.
        """

    def parameters(
        self, indices: Sequence[int] | None, columns: Sequence[str], span: Span
    ) -> Table:
        """Reads numbers per parameter.

        Args:
            indices: Parameters by their place in the layout; None for all.
            columns: Of ``grad_norm``, ``grad_norm_clipped`` and the further statistics.
            span: Which steps.

        Returns:
            ``step``, ``parameter`` and the columns: one row per step and parameter that had a
            gradient in it, in the order of the steps and within one in that of the layout.
        """

    def events(self) -> Sequence[Event]:
        """Returns the events."""


class LiveSource:
    """What the memory of a watcher holds now."""

    def __init__(self, take: Callable[[], RecordBatch]) -> None:
        """Reads from a watcher.

        Args:
            take: Copies out what is kept when it is called.
        """
        self._take = take

    def layout(self) -> Layout:
        """See :class:`Source`."""
        return self._take().layout

    def statistics(self) -> tuple[str, ...]:
        """See :class:`Source`."""
        return tuple(self._take().statistics)

    def steps(self, columns: Iterable[str], span: Span) -> Table:
        """See :class:`Source`."""
        return step_table(_within(self._take(), span).steps, columns)

    def parameters(
        self, indices: Sequence[int] | None, columns: Sequence[str], span: Span
    ) -> Table:
        """See :class:`Source`."""
        batch = _within(self._take(), span)
        chosen = np.arange(len(batch.layout.names)) if indices is None else np.array(indices, int)
        rows, places = np.nonzero(batch.norms[:, chosen] != NO_GRADIENT)
        where = (rows, chosen[places])
        steps = np.array([record.step for record in batch.steps], np.int64)
        planes = {
            **dict(zip(NORM_COLUMNS, (batch.norms, batch.clipped_norms), strict=True)),
            **batch.statistics,
        }
        table: dict[str, Column] = {
            "step": steps[rows],
            "parameter": Labels(batch.layout.names, where[1]),
        }
        return table | {name: planes[name][where] for name in columns}

    def events(self) -> Sequence[Event]:
        """See :class:`Source`."""
        return self._take().events


def _within(batch: RecordBatch, span: Span) -> RecordBatch:
    steps = np.array([record.step for record in batch.steps], np.int64)
    inside = span.holds(steps)
    if inside.all():
        return batch
    return replace(
        batch,
        steps=[record for record, kept in zip(batch.steps, inside, strict=True) if kept],
        norms=batch.norms[inside],
        clipped_norms=batch.clipped_norms[inside],
        statistics={name: plane[inside] for name, plane in batch.statistics.items()},
    )

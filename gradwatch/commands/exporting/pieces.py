"""A table of a run in pieces that fit into memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from gradwatch.history import History

TABLES = ("steps", "parameters", "events")
ROWS = 1 << 20
"""Rows of the table of parameters in one piece, about."""
SLICE = 1 << 16
"""Rows of the other tables in one piece."""


def pieces(history: History, table: str) -> Iterator[pd.DataFrame]:
    """Reads a table; there is always a first piece, which tells the columns.

    Args:
        history: The run.
        table: One of :data:`TABLES`.

    Yields:
        Frames with the same columns; steps have ``step`` as a column.
    """
    if table == "steps":
        yield from _slices(history.steps().reset_index())
    elif table == "events":
        yield from _slices(history.events())
    else:
        yield from _parameters(history)


def _slices(frame: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Cuts a frame that is there: its text would take several times its room."""
    for first in range(0, max(1, len(frame)), SLICE):
        yield frame.iloc[first : first + SLICE]


def _parameters(history: History) -> Iterator[pd.DataFrame]:
    """Reads ranges of steps, up to the one that is the last now: the run may grow meanwhile."""
    steps = history.steps(()).index
    if not len(steps):
        yield history.parameters()
        return
    first, last = int(steps.min()), int(steps.max())
    in_piece = max(1, ROWS // max(1, len(history.names)))
    for start in range(first, last + 1, in_piece):
        yield history.parameters(start=start, stop=min(start + in_piece, last + 1))

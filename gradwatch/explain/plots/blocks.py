"""Blocks: per-parameter numbers of consecutive steps as matrices, read in pieces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.explain.plots.thinning import Array
from gradwatch.record.columns import safe_text

if TYPE_CHECKING:
    import pandas as pd

    from gradwatch.explain.report.records import Records

ROWS_AT_ONCE = 2_000_000
"""Rows of ``History.parameters()`` that are held in memory at once."""

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Block:
    """The numbers of some consecutive steps.

    Attributes:
        first: The first step.
        planes: By column of ``History.parameters()`` a float array ``[steps, parameters]``.
        present: bool array of that shape: whether there was a gradient; what ``planes`` holds
            elsewhere is NaN.
    """

    first: int
    planes: Mapping[str, Array]
    present: Array


def every_step(first: int, last: int) -> list[Range]:
    """Takes one range of steps that leaves none out."""
    return [(first, last + 1)]


def spread_steps(first: int, last: int, most: int, pieces: int) -> list[Range]:
    """Spreads ranges of steps evenly over a run.

    Args:
        first: Its first step.
        last: Its last step.
        most: How many steps they hold in all, at most.
        pieces: How many ranges.

    Returns:
        First step and one after the last of each; a single range where it covers the run.
    """
    if last - first + 1 <= most:
        return every_step(first, last)
    length = max(1, most // pieces)
    starts = np.linspace(first, last + 1 - length, pieces).astype(int).tolist()
    return [(start, start + length) for start in starts]


def blocks(
    history: Records, columns: Sequence[str], ranges: Iterable[Range], rows: int = ROWS_AT_ONCE
) -> Iterator[Block]:
    """Reads blocks, one after the other.

    Args:
        history: The run.
        columns: Columns of ``History.parameters()``.
        ranges: First step and one after the last of each.
        rows: How many rows to read at once.
    """
    place = {safe_text(name): index for index, name in enumerate(history.layout.names)}
    length = max(1, rows // max(1, len(place)))
    for start, stop in ranges:
        for first in range(start, stop, length):
            end = min(first + length, stop)
            frame = history.parameters(columns=columns, start=first, stop=end)
            yield _block(frame, columns, first, end - first, place)


def _block(
    frame: pd.DataFrame,
    columns: Sequence[str],
    first: int,
    steps: int,
    place: Mapping[str, int],
) -> Block:
    import pandas as pd

    codes, names = pd.factorize(frame["parameter"])
    parameter = np.array([place[name] for name in names], np.int64)[codes]
    where = (frame["step"].to_numpy() - first, parameter)
    present = np.zeros((steps, len(place)), bool)
    present[where] = True
    planes = {name: np.full(present.shape, np.nan, np.float64) for name in columns}
    for name, plane in planes.items():
        plane[where] = frame[name].to_numpy()
    return Block(first, planes, present)

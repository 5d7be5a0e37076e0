"""HeldRows: rows of numbers that wait until W&B has room for them."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Mapping
from itertools import islice
from typing import Any, NamedTuple

MOST_ROWS = 100_000
"""Most rows that wait, of all series together; 30 MB with 10 numbers each."""


class _Numbers(NamedTuple):
    """A row of floats in little memory.

    Attributes:
        axis: Tag of the x-axis.
        step: Its value.
        tags: The other tags; one tuple for all rows that have the same.
        values: float64 array ``[len(tags)]``.
    """

    axis: str
    step: int
    tags: tuple[str, ...]
    values: array[float]


_Row = _Numbers | dict[str, Any]


def _as_dict(row: _Row) -> dict[str, Any]:
    if isinstance(row, dict):
        return row
    return {row.axis: row.step, **dict(zip(row.tags, row.values, strict=True))}


class HeldRows:
    """Rows in the order in which they came, by series.

    The tags of two series have nothing in common, so that the oldest rows of each of them go into
    one row of W&B.

    Attributes:
        lost: The number of rows that were left out because too many waited.
        most: Most rows that wait.
    """

    def __init__(self, most: int = MOST_ROWS) -> None:
        """Starts empty; at most ``most`` rows wait, at least 2."""
        self.lost = 0
        self.most = most
        self._count = 0
        self._series: dict[str, deque[_Row]] = {}
        self._tags: dict[tuple[str, ...], tuple[str, ...]] = {}

    def __len__(self) -> int:
        """Returns how many rows of W&B it takes to write everything."""
        return max(map(len, self._series.values()), default=0)

    def has(self, series: str) -> bool:
        """Returns whether a row of a series waits."""
        return bool(self._series.get(series))

    def add(self, axis: str, step: int, values: Mapping[str, float]) -> None:
        """Adds a row to a series of numbers.

        Args:
            axis: Tag of its x-axis, which names the series.
            step: Position on it.
            values: The numbers by tag.
        """
        names = tuple(values)
        tags = self._tags.setdefault(names, names)
        self._append(axis, _Numbers(axis, step, tags, array("d", list(values.values()))))

    def add_media(self, axis: str, step: int, media: Mapping[str, Any]) -> None:
        """Adds pictures and the like to the newest row of a series, or as a row of their own."""
        rows = self._series.get(axis)
        if rows:
            rows[-1] = {**_as_dict(rows[-1]), **media}
        else:
            self._append(axis, {axis: step, **media})

    def first(self) -> dict[str, Any]:
        """Returns the oldest row of each series as one; empty if none waits."""
        row: dict[str, Any] = {}
        for rows in self._series.values():
            if rows:
                row.update(_as_dict(rows[0]))
        return row

    def drop_first(self) -> None:
        """Forgets what :meth:`first` returns."""
        for rows in self._series.values():
            if rows:
                rows.popleft()
                self._count -= 1

    def _append(self, series: str, row: _Row) -> None:
        self._series.setdefault(series, deque()).append(row)
        self._count += 1
        if self._count > self.most:
            self._thin()

    def _thin(self) -> None:
        """Drops every second row of the longest series, so that the rest spans the whole run."""
        series = max(self._series, key=lambda name: len(self._series[name]))
        rows = self._series[series]
        # From the end: the newest row stays.
        kept = deque(islice(reversed(rows), 0, None, 2))
        kept.reverse()
        self.lost += len(rows) - len(kept)
        self._count -= len(rows) - len(kept)
        self._series[series] = kept

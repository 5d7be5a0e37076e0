"""Thinning: writes one row for several steps without losing a spike between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

Row = dict[str, float]
"""Name to value, for one step. A name may be missing in some steps."""


class Thinner:
    """Gathers rows until enough of them are there, then gives the one that stands for them all."""

    __slots__ = ("_every", "_pending", "_thin")

    def __init__(self, every: int, thin: Callable[[str, Sequence[float]], float]) -> None:
        """Starts with nothing gathered.

        Args:
            every: Steps that one row stands for, at least 1.
            thin: Given a name and its values, oldest first, the value that stands for them.
        """
        self._every = every
        self._thin = thin
        self._pending: list[Mapping[str, float]] = []

    @property
    def holds(self) -> bool:
        """Whether there is anything that was not given yet."""
        return bool(self._pending)

    def add(self, row: Mapping[str, float], *, now: bool) -> Row:
        """Takes the row of one step.

        Args:
            row: The values of the step.
            now: Whether to write at this step whatever the count says.

        Returns:
            The row to write at this step; empty when there is none yet.
        """
        if self._every == 1:
            return dict(row)
        self._pending.append(row)
        return self.rest() if now or len(self._pending) >= self._every else {}

    def rest(self) -> Row:
        """Gives the row that stands for what is still held, empty when nothing is."""
        rows, self._pending = self._pending, []
        if len(rows) == 1:
            return dict(rows[0])
        names = dict.fromkeys(name for row in rows for name in row)
        return {
            name: self._thin(name, [row[name] for row in rows if name in row]) for name in names
        }

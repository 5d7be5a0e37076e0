"""Part: a file of a table; its name says which rows it holds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"(\d{4,})-(\d{10,})-(\d{10,})\.parquet")


@dataclass(frozen=True, slots=True, order=True)
class Part:
    """Consecutive rows of one session.

    Attributes:
        session: Number of the session, from 1.
        first: First row, from 0.
        last: Last row.
    """

    session: int
    first: int
    last: int

    @property
    def name(self) -> str:
        """The name of its file."""
        return f"{self.session:04d}-{self.first:010d}-{self.last:010d}.parquet"

    @classmethod
    def of(cls, name: str) -> Part | None:
        """Reads a file name.

        Args:
            name: Any name.

        Returns:
            The part; None if the name is not one of a part.
        """
        match = _NAME.fullmatch(name)
        return cls(*map(int, match.groups())) if match else None

    def covers(self, other: Part) -> bool:
        """Tells whether all rows of another part are in this one."""
        return (
            self.session == other.session and self.first <= other.first <= other.last <= self.last
        )


def list_parts(folder: Path) -> list[Part]:
    """Lists the parts of a table as they were at one moment.

    A listing that is made while a merge runs may miss the merged part, which came after it had
    looked there, and the merged ones, which had gone before. Two equal listings in a row cannot.

    Args:
        folder: The folder of the table.

    Returns:
        All parts in order, those included whose rows another one covers.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    before, now = None, _listing(folder)
    while now != before:
        before, now = now, _listing(folder)
    return now


def uncovered(parts: Iterable[Part]) -> list[Part]:
    """Leaves out the parts whose rows another one covers.

    Args:
        parts: Any parts.

    Returns:
        The others, in order.
    """
    kept: list[Part] = []
    for part in sorted(parts, key=lambda part: (part.session, part.first, -part.last)):
        if not (kept and kept[-1].covers(part)):
            kept.append(part)
    return kept


def _listing(folder: Path) -> list[Part]:
    parts = (Part.of(path.name) for path in folder.iterdir())
    return sorted(part for part in parts if part is not None)

"""The parts of a table on disk: their names, and how they are written, merged and cut."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gradwatch.pickles import stable_name
from gradwatch.record.columns import Array
from gradwatch.record.folder.arrow import arrow_values
from gradwatch.record.folder.files import remove_leftovers, remove_quietly, sync_folder, write_whole
from gradwatch.record.folder.tables import STEP_INDEX, open_parquet, reading

_NAME = re.compile(r"(\d{4,})-(\d{10,})-(\d{10,})\.parquet")


@stable_name
@dataclass(frozen=True, slots=True, order=True)
class Part:
    """Consecutive rows of one session, stored as one Parquet file.

    Attributes:
        session: Number of the session, from 1.
        first: First row, from 0.
        last: Last row, included.
    """

    session: int
    first: int
    last: int

    @property
    def name(self) -> str:
        """The file name, such as ``0001-0000000000-0000000063.parquet``."""
        return f"{self.session:04d}-{self.first:010d}-{self.last:010d}.parquet"

    @classmethod
    def from_name(cls, name: str) -> Part | None:
        """Parses a file name; None if it is not the name of a part."""
        match = _NAME.fullmatch(name)
        return cls(*map(int, match.groups())) if match else None

    def covers(self, other: Part) -> bool:
        """Tells whether all rows of another part are in this one."""
        return (
            self.session == other.session and self.first <= other.first <= other.last <= self.last
        )


def list_parts(folder: Path) -> list[Part]:
    """Lists the parts of a table as of one moment, also those that another part covers.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    # A listing made during a merge may miss rows: the merged part appeared behind the place where
    # the listing was, and the small parts were removed ahead of it. Two equal listings in a row
    # cannot both have missed them.
    before, now = None, _listing(folder)
    while now != before:
        before, now = now, _listing(folder)
    return now


def uncovered(parts: Iterable[Part]) -> list[Part]:
    """Drops the parts whose rows another part covers, and sorts the others."""
    kept: list[Part] = []
    # If several parts begin at the same row, the longest comes first: then it is enough to compare
    # each part with the last one kept.
    for part in sorted(parts, key=lambda part: (part.session, part.first, -part.last)):
        if not (kept and kept[-1].covers(part)):
            kept.append(part)
    return kept


def _listing(folder: Path) -> list[Part]:
    parts = (Part.from_name(path.name) for path in folder.iterdir())
    return sorted(part for part in parts if part is not None)


FAN = 32
FULL = 1 << 20
"""Values in a part that is never merged again: a 3 MB file; merging takes 0.2 s and some 100 MB."""

# Each level is 32 times the one below. That keeps the files few, and however long the run is, each
# value is rewritten at most once per level.
LEVELS = (FULL // FAN**3, FULL // FAN**2, FULL // FAN, FULL)
"""Sizes in values. Newest parts below one of these sizes are merged once they add up to it."""


def due(sizes: Sequence[int]) -> slice | None:
    """Chooses parts to merge while the run goes on.

    Args:
        sizes: Number of values in each part of a session, oldest first.

    Returns:
        A slice of consecutive parts up to the newest; None if no merge is due.
    """
    for limit in LEVELS:
        tail = len(sizes)
        while tail and sizes[tail - 1] < limit:
            tail -= 1
        if len(sizes) - tail > 1 and sum(sizes[tail:]) >= limit:
            return slice(tail, len(sizes))
    return None


def leftovers(sizes: Sequence[int]) -> list[slice]:
    """Chooses parts to merge at the end of a run.

    Args:
        sizes: Number of values in each part of a session, oldest first.

    Returns:
        Slices of two or more consecutive parts; each group makes about one full part.
    """
    groups: list[slice] = []
    first, total = 0, 0
    for index, size in enumerate([*sizes, FULL]):
        if size >= FULL or total >= FULL:
            groups.append(slice(first, index))
            first, total = index + (size >= FULL), 0
        total += size if size < FULL else 0
    return [group for group in groups if group.stop - group.start > 1]


class PartTable(Protocol):
    """How the rows of a table are written and read."""

    def size(self, rows: int, columns: int) -> int:
        """Returns how many values a table of that many rows and columns counts for in a merge."""

    def encode(self, table: Any, small: bool) -> Any:
        """Encodes a ``pyarrow.Table`` as a Parquet file in memory."""

    def read(self, paths: Sequence[Path]) -> Any:
        """Reads whole files into one ``pyarrow.Table``."""


class PartStore:
    """The parts of one table: those that this process writes, and those already in the folder."""

    def __init__(self, folder: Path, table: PartTable) -> None:
        """Touches nothing on disk yet.

        Args:
            folder: Need not exist yet; :meth:`open` makes it.
            table: How the rows are encoded and read.
        """
        self._table = table
        self._folder = folder
        self._sizes: dict[Part, int] = {}

    def open(self) -> None:
        """Makes the folder, and removes what a killed process left half done."""
        self._folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self._folder)
        there = list_parts(self._folder)
        self._remove(set(there) - set(uncovered(there)))

    def remove_beyond(self, last_row: Mapping[int, int]) -> None:
        """Removes parts whose steps were never written.

        Args:
            last_row: By session, the last row that is in ``steps/``.
        """
        # Their process was killed after it wrote the parameters and before it wrote the steps.
        self._remove([p for p in self.parts() if p.first > last_row.get(p.session, -1)])

    def parts(self) -> list[Part]:
        """Lists the parts of all sessions, without those that another part covers."""
        return uncovered(list_parts(self._folder))

    def write(self, part: Part, table: Any) -> None:
        """Writes a ``pyarrow.Table`` as a part; call :meth:`sync` to make its name durable."""
        write_whole(self._path(part), self._table.encode(table, small=True), sync_name=False)
        self._sizes[part] = self._table.size(table.num_rows, table.num_columns)

    def sync(self) -> None:
        """Makes the names of the parts survive a power failure."""
        sync_folder(self._folder)

    def withdraw(self, part: Part) -> None:
        """Removes a part that must not be read, whether it was written completely or not."""
        self._sizes.pop(part, None)
        remove_quietly(self._path(part))

    def merge_due(self) -> None:
        """Merges parts that this process has written, if enough of them have accumulated."""
        parts = list(self._sizes)
        chosen = due(list(self._sizes.values()))
        if chosen is not None:
            self._merge(parts[chosen])

    def merge_all(self) -> None:
        """Merges the small parts of every session."""
        there = self.parts()
        for session in dict.fromkeys(part.session for part in there):
            mine = [part for part in there if part.session == session]
            for group in leftovers([self._size(part) for part in mine]):
                self._merge(mine[group])

    def cut(self, before: int, from_step: int, valid: Callable[[Part, Any], Array]) -> None:
        """Rewrites the parts of earlier sessions without the rows that are void.

        Args:
            before: Only sessions below this number are cut.
            from_step: No step before this one is void, so parts that end earlier are not read.
            valid: Maps a part and its ``pyarrow.Table`` to a bool array ``[rows]``: the rows that
                stay.
        """
        for part in self.parts():
            if part.session >= before or self._newest_step(part) < from_step:
                continue
            table = self._table.read([self._path(part)])
            kept = valid(part, table)
            if not kept.any():
                self._remove([part])
            elif not kept.all():
                content = self._table.encode(table.filter(arrow_values(kept)), small=False)
                write_whole(self._path(part), content)

    def _merge(self, parts: Sequence[Part]) -> None:
        whole = Part(parts[0].session, parts[0].first, parts[-1].last)
        table = self._table.read([self._path(part) for part in parts])
        # Write the merged part before removing the others: no row is missing at any moment.
        write_whole(self._path(whole), self._table.encode(table, small=False))
        self._remove(set(parts) - {whole})
        # Keep the sizes of this process's parts only: those of other sessions are of any size.
        kept = {part: size for part, size in self._sizes.items() if part not in parts}
        if len(kept) < len(self._sizes):
            kept[whole] = self._table.size(table.num_rows, table.num_columns)
        self._sizes = kept

    def _remove(self, parts: Iterable[Part]) -> None:
        for part in parts:
            self._path(part).unlink(missing_ok=True)
        sync_folder(self._folder)

    def _size(self, part: Part) -> int:
        metadata = open_parquet(self._path(part), ()).metadata
        return self._table.size(metadata.num_rows, metadata.num_columns)

    def _newest_step(self, part: Part) -> int:
        with reading(self._path(part)):
            metadata = open_parquet(self._path(part), ()).metadata
            groups = range(metadata.num_row_groups)
            newest = (
                metadata.row_group(group).column(STEP_INDEX).statistics.max for group in groups
            )
            return int(max(newest, default=0))

    def _path(self, part: Part) -> Path:
        return self._folder / part.name

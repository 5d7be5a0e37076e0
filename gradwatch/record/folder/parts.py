"""The parts of a table on the disk: named, added to, merged and cut."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gradwatch.pickles import stable_name
from gradwatch.record.columns import Array
from gradwatch.record.folder.files import remove_leftovers, remove_quietly, sync_folder, write_whole
from gradwatch.record.folder.tables import STEP_INDEX, open_parquet, reading

_NAME = re.compile(r"(\d{4,})-(\d{10,})-(\d{10,})\.parquet")


@stable_name
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
    def from_name(cls, name: str) -> Part | None:
        """Reads a file name; None if it is not one of a part."""
        match = _NAME.fullmatch(name)
        return cls(*map(int, match.groups())) if match else None

    def covers(self, other: Part) -> bool:
        """Tells whether all rows of another part are in this one."""
        return (
            self.session == other.session and self.first <= other.first <= other.last <= self.last
        )


def list_parts(folder: Path) -> list[Part]:
    """Lists the parts of a table as they were at one moment, those included that one covers.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    # A listing that is made while a merge runs may miss the merged part, which came after it had
    # looked there, and the merged ones, which had gone before. Two equal ones in a row cannot.
    before, now = None, _listing(folder)
    while now != before:
        before, now = now, _listing(folder)
    return now


def uncovered(parts: Iterable[Part]) -> list[Part]:
    """Leaves out the parts whose rows another one covers, and puts the others in order."""
    kept: list[Part] = []
    # Of parts that begin together the longest comes first, so that one look back is enough.
    for part in sorted(parts, key=lambda part: (part.session, part.first, -part.last)):
        if not (kept and kept[-1].covers(part)):
            kept.append(part)
    return kept


def _listing(folder: Path) -> list[Part]:
    parts = (Part.from_name(path.name) for path in folder.iterdir())
    return sorted(part for part in parts if part is not None)


FAN = 32
FULL = 1 << 20
"""Values in a part that is never merged again: 3 MB, 0.2 s and some 100 MB to make it of others."""

# Each level is 32 times the one below: the files stay few, and however long the run, a value is
# rewritten once per level at most.
LEVELS = (FULL // FAN**3, FULL // FAN**2, FULL // FAN, FULL)
"""A part is of a level by its size; what a level holds is merged when it makes one of the next."""


def due(sizes: Sequence[int]) -> slice | None:
    """Chooses parts to merge while the run goes on.

    Args:
        sizes: Values in each part of a session, oldest first.

    Returns:
        Consecutive parts up to the newest; None if there is nothing to do yet.
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
        sizes: Values in each part of a session, oldest first.

    Returns:
        Groups of two or more consecutive parts that make about a full one each.
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
        """Returns how many values are worth counting in a table of so many rows and columns."""

    def encode(self, table: Any, small: bool) -> Any:
        """Writes a ``pyarrow.Table`` as a Parquet file into memory."""

    def read(self, paths: Sequence[Path]) -> Any:
        """Reads whole files into one ``pyarrow.Table``."""


class PartStore:
    """The parts of one table that this process adds, and those that it finds."""

    def __init__(self, folder: Path, table: PartTable) -> None:
        """Names a folder that need not be there yet, and how its rows are written."""
        self._table = table
        self._folder = folder
        self._sizes: dict[Part, int] = {}

    def open(self) -> None:
        """Makes the folder, and clears away what a killed process left half done."""
        self._folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self._folder)
        there = list_parts(self._folder)
        self._remove(set(there) - set(uncovered(there)))

    def remove_beyond(self, last_row: Mapping[int, int]) -> None:
        """Removes parts that nobody reads, by session those behind the last row that counts."""
        # Their process was killed between writing the parameters and writing the steps.
        self._remove([p for p in self.parts() if p.first > last_row.get(p.session, -1)])

    def parts(self) -> list[Part]:
        """Lists the parts of all sessions."""
        return uncovered(list_parts(self._folder))

    def write(self, part: Part, table: Any) -> None:
        """Writes the rows of a part, a ``pyarrow.Table``; :meth:`sync` makes its name last."""
        write_whole(self._path(part), self._table.encode(table, small=True), sync_name=False)
        self._sizes[part] = self._table.size(table.num_rows, table.num_columns)

    def sync(self) -> None:
        """Makes the names of the parts survive a power failure."""
        sync_folder(self._folder)

    def withdraw(self, part: Part) -> None:
        """Removes a part that was written, or nearly, and is not to be read."""
        self._sizes.pop(part, None)
        remove_quietly(self._path(part))

    def merge_due(self) -> None:
        """Merges what this process has written, where there is much of it."""
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
            before: Sessions below this number are looked at.
            from_step: No earlier step is void.
            valid: Tells of a part and its ``pyarrow.Table`` which rows stay: bool array ``[rows]``.
        """
        import pyarrow as pa

        for part in self.parts():
            if part.session >= before or self._newest_step(part) < from_step:
                continue
            table = self._table.read([self._path(part)])
            kept = valid(part, table)
            if not kept.any():
                self._remove([part])
            elif not kept.all():
                content = self._table.encode(table.filter(pa.array(kept)), small=False)
                write_whole(self._path(part), content)

    def _merge(self, parts: Sequence[Part]) -> None:
        whole = Part(parts[0].session, parts[0].first, parts[-1].last)
        table = self._table.read([self._path(part) for part in parts])
        # The merged part first, so that no row is missing at any moment.
        write_whole(self._path(whole), self._table.encode(table, small=False))
        self._remove(set(parts) - {whole})
        # Only what this process has written is counted: the parts of others may be any size.
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

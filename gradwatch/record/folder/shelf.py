"""Shelf: the parts of one table on the disk, added to, merged and cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from gradwatch.record.columns import Array
from gradwatch.record.folder import merge
from gradwatch.record.folder.arrow import open_parquet, reading
from gradwatch.record.folder.atomic import remove_leftovers, sync_folder, write_whole
from gradwatch.record.folder.parts import Part, list_parts, uncovered

STEP = 1
"""Place of the column ``step`` in every table, behind ``row``."""


class PartTable(Protocol):
    """How the rows of a table are written and read."""

    folder: str

    def size(self, rows: int, columns: int) -> int:
        """Returns how many values are worth counting in a table of so many rows and columns."""

    def encode(self, table: Any, small: bool) -> Any:
        """Writes a ``pyarrow.Table`` as a Parquet file into memory."""

    def read(self, paths: Sequence[Path]) -> Any:
        """Reads whole files into one ``pyarrow.Table``."""


class Shelf:
    """The parts of one table that this process adds, and those that it finds."""

    def __init__(self, run: Path, table: PartTable) -> None:
        """Takes a folder that need not be there yet.

        Args:
            run: The run folder.
            table: How its rows are written.
        """
        self._table = table
        self._folder = run / table.folder
        self._sizes: dict[Part, int] = {}

    def open(self) -> None:
        """Makes the folder, and clears away what a killed process left half done."""
        self._folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self._folder)
        there = list_parts(self._folder)
        self._remove(set(there) - set(uncovered(there)))

    def remove_beyond(self, last_row: Mapping[int, int]) -> None:
        """Removes the parts of rows that nobody reads, as their process was killed too early.

        Args:
            last_row: By session the last row that counts.
        """
        self._remove([p for p in self.parts() if p.first > last_row.get(p.session, -1)])

    def parts(self) -> list[Part]:
        """Lists the parts of all sessions."""
        return uncovered(list_parts(self._folder))

    def add(self, part: Part, table: Any) -> None:
        """Writes a part; :meth:`sync` makes its name last.

        Args:
            part: Which rows these are.
            table: The rows as a ``pyarrow.Table``.
        """
        write_whole(self._path(part), self._table.encode(table, small=True), sync_name=False)
        self._sizes[part] = self._table.size(table.num_rows, table.num_columns)

    def sync(self) -> None:
        """Makes the names of the parts survive a power failure."""
        sync_folder(self._folder)

    def withdraw(self, part: Part) -> None:
        """Takes a part back that is not to be read, as far as the disk allows.

        Args:
            part: One that :meth:`add` has written, or tried to.
        """
        self._sizes.pop(part, None)
        with suppress(OSError):
            self._path(part).unlink(missing_ok=True)

    def merge_due(self) -> None:
        """Merges what this process has written, where there is much of it."""
        parts = list(self._sizes)
        chosen = merge.due(list(self._sizes.values()))
        if chosen is not None:
            self._merge(parts[chosen])

    def merge_all(self) -> None:
        """Merges the small parts of every session."""
        there = self.parts()
        for session in dict.fromkeys(part.session for part in there):
            mine = [part for part in there if part.session == session]
            for group in merge.leftovers([self._size(part) for part in mine]):
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
        """Writes the merged part first, so that no row is missing at any moment."""
        whole = Part(parts[0].session, parts[0].first, parts[-1].last)
        table = self._table.read([self._path(part) for part in parts])
        write_whole(self._path(whole), self._table.encode(table, small=False))
        self._remove(set(parts) - {whole})
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
            newest = (metadata.row_group(group).column(STEP).statistics.max for group in groups)
            return int(max(newest, default=0))

    def _path(self, part: Part) -> Path:
        return self._folder / part.name

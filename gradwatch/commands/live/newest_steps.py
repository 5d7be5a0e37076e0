"""Reads the newest steps of a run from its end, whatever its length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gradwatch.commands.live.row import FIELDS, Row
from gradwatch.record.columns import Labels, Table, array_of, labels_in
from gradwatch.record.folder.arrow import open_parquet, reading
from gradwatch.record.folder.beginnings import Beginnings
from gradwatch.record.folder.meta import STEPS
from gradwatch.record.folder.parts import Part, list_parts, uncovered
from gradwatch.record.folder.query import read_columns
from gradwatch.record.folder.resume import FirstSteps, is_valid
from gradwatch.record.folder.steps_table import LABELS


class Place(NamedTuple):
    """Where in a run a step is.

    Attributes:
        session: Number of the session, from 1.
        row: Row in it, from 0.
    """

    session: int
    row: int


BEGINNING = Place(0, -1)


class Newest(NamedTuple):
    """Steps from the end of a run.

    Attributes:
        rows: The steps, oldest first.
        left_out: How many more there are behind the place where reading was to begin.
        end: The place of the newest step.
        first: Where sessions begin, if there are several.
        last: By session its newest row.
    """

    rows: tuple[Row, ...]
    left_out: int
    end: Place
    first: FirstSteps
    last: dict[int, int]


def newest_steps(folder: Path, behind: Place, most: int, first: FirstSteps | None) -> Newest:
    """Reads the steps behind a place, the newest ones if there are many.

    Args:
        folder: The run folder.
        behind: The newest step that is known already.
        most: How many steps to return.
        first: Where sessions begin, if that is known and no session has come since.

    Returns:
        The steps. Files are read from the newest row group on until there are enough.

    Raises:
        FileNotFoundError: If a file was merged into another one meanwhile.
    """
    parts = uncovered(list_parts(folder / STEPS))
    last = {part.session: part.last for part in parts}
    known = first is not None and set(last) <= {behind.session, *first}
    begins = first if known and first is not None else Beginnings(folder / STEPS).of(parts)
    rows: list[Row] = []
    for table in _from_the_end(folder / STEPS, parts, behind):
        rows[:0] = _valid_rows(table, begins, most)
        if len(rows) >= most:
            break
    end = Place(parts[-1].session, parts[-1].last) if parts else behind
    since = end.row - behind.row if end.session == behind.session else sum(_lengths(parts, behind))
    kept = rows[-most:]
    return Newest(tuple(kept), max(0, since - len(kept)), max(end, behind), begins, last)


def _lengths(parts: Sequence[Part], behind: Place) -> Iterator[int]:
    for part in parts:
        if part.session >= behind.session:
            known = behind.row if part.session == behind.session else -1
            yield max(0, part.last - max(part.first - 1, known))


def _from_the_end(folder: Path, parts: Sequence[Part], behind: Place) -> Iterator[dict[str, Any]]:
    """Gives row groups, newest first, without the rows that are known."""
    for part in reversed(parts):
        if Place(part.session, part.last) <= behind:
            return
        file = open_parquet(folder / part.name, LABELS)
        for group in reversed(range(file.metadata.num_row_groups)):
            with reading(folder / part.name):
                table = dict(read_columns(file, [group], ("row", *FIELDS)))
                table = {name: table[name] for name in ("row", *FIELDS)}
            table["session"] = np.full(len(table["row"]), part.session)
            if part.session == behind.session:
                new = array_of(table["row"]) > behind.row
                table = {name: column[new] for name, column in table.items()}
            yield table


def _valid_rows(table: Table, first: FirstSteps, most: int) -> list[Row]:
    optimizers = labels_in(table["optimizer"])
    valid = is_valid(first, array_of(table["session"]), optimizers, array_of(table["step"]))
    kept = np.flatnonzero(valid)[-most:]
    columns = [_objects(table[name][kept]) for name in FIELDS]
    return [Row(*values) for values in zip(*columns, strict=True)]


def _objects(column: Any) -> list[Any]:
    if isinstance(column, Labels):
        return [column.values[code] for code in column.codes]
    values: list[Any] = column.tolist()
    return values

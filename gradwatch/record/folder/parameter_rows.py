"""ParameterRows: reads the table of parameters, for the steps and names that are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradwatch.record.batch import Layout, clipped_by
from gradwatch.record.columns import (
    NORM_COLUMNS,
    Array,
    Column,
    Labels,
    Table,
    array_of,
    labels_in,
    safe_text,
)
from gradwatch.record.folder.arrow import open_parquet, reading
from gradwatch.record.folder.parameters_table import KEYS, LABELS
from gradwatch.record.folder.parts import Part, list_parts, uncovered
from gradwatch.record.folder.query import groups_with_names, read_columns

CLIPPED = "grad_norm_clipped"
SPARSE = 4
"""Slots per row up to which the matrix of places and indices is worth making."""

FOLLOWS = "follows"
"""Column of whether the norm after the clip follows from the one before and the coefficient."""


class ParameterRows:
    """The table of parameters of a run folder."""

    def __init__(self, folder: Path) -> None:
        """Reads from a folder.

        Args:
            folder: The one with the parts.
        """
        self._folder = folder
        self._dtypes: dict[Part, dict[str, type[np.generic]]] = {}

    def statistics(self) -> tuple[str, ...]:
        """Returns the names of the further statistics, in the order in which they came."""
        return tuple(name for name in self._columns(self._parts()) if name not in NORM_COLUMNS)

    def read(
        self, layout: Layout, steps: Table, indices: Sequence[int] | None, columns: Sequence[str]
    ) -> Table:
        """Reads numbers.

        Args:
            layout: The parameters.
            steps: ``session``, ``row``, ``step`` and ``clip_coef`` of the steps to read, in order.
            indices: Parameters by their place in the layout; None for all.
            columns: What to read of each.

        Returns:
            ``step``, ``parameter`` and the columns, in the order of steps and layout.
        """
        parts = self._parts()
        dtypes = self._columns(parts)
        wanted = _Wanted(layout, indices)
        rows = _Rows(steps)
        numbers = dict.fromkeys((*columns, *(["grad_norm"] if CLIPPED in columns else [])))
        pieces = [self._piece(part, wanted, rows, list(numbers)) for part in parts if part in rows]
        table = _ordered(_joined([piece for piece in pieces if piece], [*numbers], dtypes))
        places = table["place"]
        if CLIPPED in columns:
            coefficients = array_of(steps["clip_coef"])[places]
            derived = clipped_by(table["grad_norm"], coefficients)
            table[CLIPPED] = np.where(table[FOLLOWS], derived, table[CLIPPED])
        result: dict[str, Column] = {
            "step": array_of(steps["step"])[places],
            "parameter": Labels(layout.names, table["index"]),
        }
        return result | {name: table[name] for name in columns}

    def _piece(
        self, part: Part, wanted: _Wanted, rows: _Rows, numbers: Sequence[str]
    ) -> dict[str, Array] | None:
        """Reads what is wanted of one part; None where that is nothing."""
        path = self._folder / part.name
        file = open_parquet(path, LABELS)
        with reading(path):
            groups = wanted.groups(file)
            if not groups:
                return None
            names = ("row", "parameter", *numbers)
            table = read_columns(file, groups, names, nulls={FOLLOWS: CLIPPED})
        columns = {name: array_of(table[name]) for name in (*numbers, FOLLOWS) if name in table}
        columns["place"] = rows.places(part.session, array_of(table["row"]))
        columns["index"] = wanted.indices(table["parameter"])
        kept = (columns["place"] >= 0) & (columns["index"] >= 0)
        return columns if kept.all() else {name: array[kept] for name, array in columns.items()}

    def _columns(self, parts: Sequence[Part]) -> dict[str, type[np.generic]]:
        """Tells the columns of numbers and their dtypes: the widest that a part has."""
        dtypes: dict[str, type[np.generic]] = dict.fromkeys(NORM_COLUMNS, np.float32)
        of_parts = (column for part in parts for column in self._of_part(part).items())
        return dtypes | {name: dtype for name, dtype in of_parts if dtype is np.float64}

    def _of_part(self, part: Part) -> dict[str, type[np.generic]]:
        if part not in self._dtypes:
            schema = open_parquet(self._folder / part.name, LABELS).schema_arrow
            self._dtypes[part] = {
                field.name: np.float32 if str(field.type) == "float" else np.float64
                for field in schema
                if field.name in NORM_COLUMNS or field.name not in KEYS
            }
        return self._dtypes[part]

    def _parts(self) -> list[Part]:
        return uncovered(list_parts(self._folder))


class _Wanted:
    """The parameters to read."""

    def __init__(self, layout: Layout, indices: Sequence[int] | None) -> None:
        places = range(len(layout.names)) if indices is None else indices
        self._index = {safe_text(layout.names[place]): place for place in places}
        self._sorted = None if indices is None else sorted(self._index)

    def groups(self, file: Any) -> list[int]:
        """Finds the row groups that can hold one of them."""
        if self._sorted is None:
            return list(range(file.metadata.num_row_groups))
        return groups_with_names(file, self._sorted)

    def indices(self, parameters: Column) -> Array:
        """Finds the place of each row's parameter in the layout; -1 where it is not wanted."""
        labels = labels_in(parameters)
        known = np.array([self._index.get(name, -1) for name in labels.values], np.int64)
        found: Array = known[labels.codes]
        return found


class _Rows:
    """Where the rows of each session stand among the steps that are read."""

    def __init__(self, steps: Table) -> None:
        sessions, rows = array_of(steps["session"]), array_of(steps["row"])
        self._places: dict[int, tuple[int, Array]] = {}
        for session in np.unique(sessions).tolist():
            mine = np.flatnonzero(sessions == session)
            first = int(rows[mine].min())
            places = np.full(int(rows[mine].max()) - first + 1, -1, np.int64)
            places[rows[mine] - first] = mine
            self._places[session] = first, places

    def __contains__(self, part: Part) -> bool:
        """Tells whether a part can hold one of the rows."""
        first, places = self._places.get(part.session, (0, np.empty(0, np.int64)))
        return bool((places[max(0, part.first - first) : max(0, part.last + 1 - first)] >= 0).any())

    def places(self, session: int, rows: Array) -> Array:
        """Finds the place of each row; -1 where it is not wanted."""
        first, places = self._places[session]
        inside = (rows >= first) & (rows < first + len(places))
        return np.where(inside, places[np.where(inside, rows - first, 0)], -1)


def _joined(
    pieces: Sequence[dict[str, Array]], numbers: Sequence[str], dtypes: dict[str, type[np.generic]]
) -> dict[str, Array]:
    return {
        name: np.concatenate(list(_filled(pieces, name, dtype)))
        for name, dtype in {
            **{name: dtypes[name] for name in numbers},
            "place": np.int64,
            "index": np.int64,
            FOLLOWS: np.bool_,
        }.items()
    }


def _filled(
    pieces: Sequence[dict[str, Array]], name: str, dtype: type[np.generic]
) -> Iterator[Array]:
    """Gives a column piece by piece, NaN where a part does not have it."""
    yield np.empty(0, dtype)
    for piece in pieces:
        if name in piece:
            yield piece[name].astype(dtype, copy=False)
        elif name != FOLLOWS:
            yield np.full(len(piece["place"]), np.nan, dtype)


def _ordered(table: dict[str, Array]) -> dict[str, Array]:
    """Sorts rows by step, and within one by the layout."""
    order = _order(table["place"], table["index"])
    length = len(order)
    return {
        name: column[order] if len(column) == length else column for name, column in table.items()
    }


def _order(places: Array, indices: Array) -> Array:
    """Finds the order by place and then by index.

    Where most places have most indices each row is put into its slot of the matrix, which takes a
    third of the time of sorting.
    """
    width = int(indices.max(initial=0)) + 1
    slots = (int(places.max(initial=0)) + 1) * width
    if slots <= SPARSE * len(places):
        matrix = np.full(slots, -1, np.int64)
        matrix[places * width + indices] = np.arange(len(places))
        order: Array = matrix[matrix >= 0]
        if len(order) == len(places):
            return order  # no slot was wanted twice
    return np.lexsort((indices, places))

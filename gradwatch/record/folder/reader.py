"""Reads a run folder by columns and steps, also while it is written."""

from __future__ import annotations

import os
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from gradwatch.record.columns import (
    NORM_COLUMNS,
    STEP_DTYPES,
    Array,
    Column,
    Labels,
    Span,
    Table,
    array_of,
    labels_in,
    safe_text,
)
from gradwatch.record.folder.event_log import LINES, LoggedEvent, read_events
from gradwatch.record.folder.meta import EVENTS, PARAMETERS, STEPS, Meta, check_whole, read_meta
from gradwatch.record.folder.parts import STEP, Part, list_parts, uncovered
from gradwatch.record.folder.tables import (
    KEYS,
    PARAMETER_LABELS,
    STEP_LABELS,
    labels_of,
    need_pyarrow,
    open_parquet,
    reading,
)
from gradwatch.record.records import Event, Layout, clipped_by

PARAMETER = 3
"""Place of the column ``parameter`` in its table."""


def groups_with_steps(file: Any, span: Span) -> list[int]:
    """Finds the row groups that can hold steps of a range.

    Args:
        file: A ``pyarrow.parquet.ParquetFile``.
        span: The range.
    """
    groups = range(file.metadata.num_row_groups)
    if span == Span():
        return list(groups)
    bounds = (file.metadata.row_group(group).column(STEP).statistics for group in groups)
    return [group for group, of in enumerate(bounds) if span.touches(of.min, of.max)]


def groups_with_names(file: Any, names: Sequence[str]) -> list[int]:
    """Finds the row groups that can hold parameters, of a file that is sorted by their names.

    Args:
        file: A ``pyarrow.parquet.ParquetFile``.
        names: The names, sorted.
    """
    metadata = file.metadata
    groups = range(metadata.num_row_groups)

    def bounds(group: int) -> tuple[str, str] | None:
        of = metadata.row_group(group).column(PARAMETER).statistics
        # A name of more than 4 kB has no bounds.
        return (of.min, of.max) if of is not None and of.has_min_max else None

    if not names or not groups or bounds(0) is None or bounds(groups[-1]) is None:
        return list(groups) if names else []
    found = []
    first = bisect_left(groups, names[0], key=lambda group: (bounds(group) or ("", names[0]))[1])
    for group in groups[first:]:
        low, high = bounds(group) or (names[0], names[-1])
        if low > names[-1]:
            break
        place = bisect_left(names, low)
        if place < len(names) and names[place] <= high:
            found.append(group)
    return found


def read_columns(
    file: Any, groups: Sequence[int], names: Iterable[str], nulls: Mapping[str, str] | None = None
) -> dict[str, Column]:
    """Reads columns of some row groups.

    Args:
        file: A ``pyarrow.parquet.ParquetFile``.
        groups: The row groups.
        names: The columns; one that the file does not have is left out.
        nulls: Further columns to make, by name: of bools, where the column that stands for it is
            null.

    Returns:
        The columns by name; NaN where a number is null.
    """
    there = [name for name in names if name in file.schema_arrow.names]
    table = file.read_row_groups(list(groups), columns=there, use_threads=False)
    columns = {name: _column(table[name]) for name in there}
    missing = {new: old for new, old in (nulls or {}).items() if old in columns}
    return columns | {new: table[old].is_null().to_numpy() for new, old in missing.items()}


def join(columns: Sequence[Column]) -> Column:
    """Puts columns end to end.

    Args:
        columns: At least one; all labels or all arrays.
    """
    if not isinstance(columns[0], Labels):
        return np.concatenate([column for column in columns if not isinstance(column, Labels)])
    code: dict[str, int] = {}
    codes = []
    for labels in columns:
        if isinstance(labels, Labels):
            mapped = [code.setdefault(value, len(code)) for value in labels.values]
            codes.append(np.array(mapped, np.int64)[labels.codes])
    return Labels(tuple(code), np.concatenate(codes))


def _column(column: Any) -> Column:
    if str(column.type).startswith("dictionary"):
        return labels_of(column)
    array: Array = column.to_numpy()
    return array


FirstSteps = Mapping[int, Mapping[str, int]]
"""By session and optimizer the first step of it."""


def first_steps(sessions: Array, optimizers: Labels, steps: Array) -> dict[int, dict[str, int]]:
    """Finds where each session begins.

    Args:
        sessions: int array ``[rows]``.
        optimizers: Label of each row's optimizer.
        steps: int array ``[rows]``.

    Returns:
        By session the lowest step of each optimizer.
    """
    first: dict[int, dict[str, int]] = {}
    for session in np.unique(sessions).tolist():
        of_session = sessions == session
        first[session] = {
            label: int(steps[mine].min())
            for code, label in enumerate(optimizers.values)
            if (mine := of_session & (optimizers.codes == code)).any()
        }
    return first


def replaced_from(first: FirstSteps, session: int, optimizer: str) -> int | None:
    """Finds the step from which on a session's steps of an optimizer are void.

    Args:
        first: Where each session begins.
        session: The session.
        optimizer: Label of the optimizer.

    Returns:
        The lowest step that a later session has of it; None if no later one has any.
    """
    later = [of[optimizer] for number, of in first.items() if number > session and optimizer in of]
    return min(later, default=None)


def is_valid(first: FirstSteps, sessions: Array, optimizers: Labels, steps: Array) -> np.ndarray:
    """Tells which rows no later session has replaced.

    Args:
        first: Where each session begins.
        sessions: int array ``[rows]``.
        optimizers: Label of each row's optimizer.
        steps: int array ``[rows]``.

    Returns:
        bool array ``[rows]``.
    """
    valid = np.ones(len(steps), bool)
    for session in np.unique(sessions).tolist():
        for code, label in enumerate(optimizers.values):
            end = replaced_from(first, session, label)
            if end is not None:
                mine = (sessions == session) & (optimizers.codes == code)
                valid &= ~(mine & (steps >= end))
    return valid


def valid_events(
    first: FirstSteps, session: int, events: Iterable[LoggedEvent]
) -> list[LoggedEvent]:
    """Leaves out the events of steps that a later session has replaced.

    Args:
        first: Where each session begins.
        session: The session of the events.
        events: Its events.

    Returns:
        The others. An event that belongs to no optimizer goes with the steps of any.
    """
    labels = {label for of in first.values() for label in of}
    ends: dict[str, int | None] = {}
    kept = []
    for noted in events:
        event = noted.event
        if event.optimizer not in ends:
            of_any = event.optimizer == "none" and "none" not in labels
            owners = sorted(labels) if of_any else [event.optimizer]
            found = [replaced_from(first, session, label) for label in owners]
            ends[event.optimizer] = min((end for end in found if end is not None), default=None)
        end = ends[event.optimizer]
        if end is None or event.step < end:
            kept.append(noted)
    return kept


class SessionStarts:
    """The first step of each session and optimizer; a part is read once."""

    def __init__(self, folder: Path) -> None:
        """Reads from a folder.

        Args:
            folder: The one with the parts of the steps.
        """
        self._folder = folder
        self._of_part: dict[Part, dict[str, int]] = {}

    def of(self, parts: Sequence[Part]) -> dict[int, dict[str, int]]:
        """Finds where sessions begin.

        Args:
            parts: The parts that there are.

        Returns:
            By session the lowest step of each optimizer; nothing where there is one session only,
            of which no step is void.
        """
        if len({part.session for part in parts}) < 2:
            return {}
        first: dict[int, dict[str, int]] = {}
        for part in parts:
            mine = first.setdefault(part.session, {})
            for label, lowest in self._read(part).items():
                mine[label] = min(lowest, mine.get(label, lowest))
        return first

    def _read(self, part: Part) -> dict[str, int]:
        if part not in self._of_part:
            path = self._folder / part.name
            file = open_parquet(path, STEP_LABELS)
            with reading(path):
                groups = range(file.metadata.num_row_groups)
                table = read_columns(file, groups, ("step", "optimizer"))
                steps, optimizers = array_of(table["step"]), labels_in(table["optimizer"])
            sessions = np.full(len(steps), part.session)
            first = first_steps(sessions, optimizers, steps)
            self._of_part[part] = first.get(part.session, {})
        return self._of_part[part]


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
        file = open_parquet(path, PARAMETER_LABELS)
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
            schema = open_parquet(self._folder / part.name, PARAMETER_LABELS).schema_arrow
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


TRIES = 50
PAUSE_S = 0.02

T = TypeVar("T")


class FolderSource:
    """A :class:`~gradwatch.record.columns.Source` that reads what the folder holds at each call."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens a folder.

        Args:
            path: The run folder.

        Raises:
            FileNotFoundError: If there is no such folder.
            ValueError: If it is no run folder, is written in a newer format, or parts are missing.
            ModuleNotFoundError: If pyarrow is not installed.
        """
        need_pyarrow("gradwatch.load()")
        self._folder = Path(path)
        self._read_meta()
        check_whole(self._folder)
        self._beginnings = SessionStarts(self._folder / STEPS)
        self._rows = ParameterRows(self._folder / PARAMETERS)

    def layout(self) -> Layout:
        """See :class:`~gradwatch.record.columns.Source`."""
        return self._read_meta().layout

    def statistics(self) -> tuple[str, ...]:
        """See :class:`~gradwatch.record.columns.Source`."""
        return self._steadily(self._rows.statistics)

    def steps(self, columns: Iterable[str], span: Span) -> Table:
        """See :class:`~gradwatch.record.columns.Source`."""
        wanted = tuple(columns)
        table = self._steadily(lambda: self._steps(wanted, span))
        return {name: table[name] for name in wanted}

    def parameters(
        self, indices: Sequence[int] | None, columns: Sequence[str], span: Span
    ) -> Table:
        """See :class:`~gradwatch.record.columns.Source`."""

        def read() -> Table:
            steps = self._steps(("session", "row", "step", "clip_coef"), span)
            return self._rows.read(self.layout(), steps, indices, columns)

        return self._steadily(read)

    def events(self) -> Sequence[Event]:
        """See :class:`~gradwatch.record.columns.Source`."""
        return self._steadily(self._events)

    def _read_meta(self) -> Meta:
        return read_meta(self._folder)

    def _steadily(self, read: Callable[[], T]) -> T:
        """Begins anew where a file went away, merged into another, before it could be read."""
        for _ in range(TRIES):
            with suppress(FileNotFoundError):
                return read()
            read_meta(self._folder)
            check_whole(self._folder)
            time.sleep(PAUSE_S)
        return read()

    def _steps(self, columns: Sequence[str], span: Span) -> dict[str, Column]:
        parts = uncovered(list_parts(self._folder / STEPS))
        first = self._beginnings.of(parts)
        tables = [self._part(part, ("step", "optimizer", *columns), span) for part in parts]
        wanted = dict.fromkeys(("session", "step", "optimizer", *columns))
        table = {name: _join_sessions(name, [table[name] for table in tables]) for name in wanted}
        kept = span.holds(array_of(table["step"]))
        if len(first) > 1:
            optimizer = labels_in(table["optimizer"])
            session, step = array_of(table["session"]), array_of(table["step"])
            kept &= is_valid(first, session, optimizer, step)
        return table if kept.all() else {name: column[kept] for name, column in table.items()}

    def _part(self, part: Part, columns: Iterable[str], span: Span) -> dict[str, Column]:
        path = self._folder / STEPS / part.name
        file = open_parquet(path, STEP_LABELS)
        wanted = [name for name in dict.fromkeys(columns) if name != "session"]
        with reading(path):
            table = read_columns(file, groups_with_steps(file, span), wanted)
            rows = len(table["step"])
            table |= {name: _new(name, rows) for name in wanted if name not in table}
        return {**table, "session": np.full(rows, part.session)}

    def _events(self) -> list[Event]:
        parts = uncovered(list_parts(self._folder / STEPS))
        first, last = self._beginnings.of(parts), {part.session: part.last for part in parts}
        events: list[Event] = []
        for path in sorted((self._folder / EVENTS).iterdir()):
            if path.suffix == LINES and path.stem.isdigit():
                session = int(path.stem)
                valid = valid_events(first, session, read_events(path))
                events += [event for event, row in valid if row <= last.get(session, -1)]
        return events


def _new(name: str, rows: int) -> Column:
    """Makes a column that the gradwatch of that time did not write: a number that is not known."""
    if STEP_DTYPES.get(name) is not np.float64:
        raise KeyError(name)
    return np.full(rows, np.nan)


def _join_sessions(name: str, columns: list[Column]) -> Column:
    if columns:
        return join(columns)
    dtype = STEP_DTYPES.get(name, np.int64)
    return Labels((), np.empty(0, np.int64)) if dtype is None else np.empty(0, dtype)

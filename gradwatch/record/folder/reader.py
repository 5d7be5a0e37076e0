"""Reads columns and step ranges from a run folder, also while the run writes to it.

Each read does the same: list the parts, find the steps that a resumed session made void, read the
row groups that can hold the wanted rows, and join the results.
"""

from __future__ import annotations

import os
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from gradwatch.pickles import stable_name
from gradwatch.record.columns import (
    NORM_COLUMNS,
    STEP_DTYPES,
    Array,
    Column,
    Labels,
    Span,
    Table,
    Truths,
    array_of,
    labels_in,
    safe_text,
    take_rows,
    truths_in,
)
from gradwatch.record.folder.event_log import event_files, read_events
from gradwatch.record.folder.meta import EVENTS, PARAMETERS, STEPS, check_whole, read_meta
from gradwatch.record.folder.parts import Part, list_parts, uncovered
from gradwatch.record.folder.ranks import RankNotes, SessionTimes
from gradwatch.record.folder.tables import (
    EVERY_RUN_HAS,
    KEYS,
    PARAMETER_INDEX,
    PARAMETER_LABELS,
    STEP_INDEX,
    STEP_LABELS,
    labels_of,
    need_pyarrow,
    open_parquet,
    reading,
    truths_of,
)
from gradwatch.record.records import Event, Layout, ParameterGroups, StepRecord, clipped_by

if TYPE_CHECKING:
    from gradwatch.record.explanation import Explanation
    from gradwatch.record.folder.explanations import KeptExplanation

TRIES = 50
PAUSE_S = 0.02
MAX_STEP = np.iinfo(np.int64).max

T = TypeVar("T")


class ReadPosition(NamedTuple):
    """How far a run has been read: the last step that was.

    Attributes:
        session: Number of the session, from 1; 0 before the first step.
        row: Row in that session, from 0; -1 before the first step.
    """

    session: int = 0
    row: int = -1


@dataclass(frozen=True, slots=True)
class Listing:
    """The parts with the steps of a run, as of one moment.

    Attributes:
        parts: Oldest first; no two of them share a row.
        rule: Says which of their steps are void.
    """

    parts: Sequence[Part]
    rule: ResumeRule

    @property
    def end(self) -> ReadPosition:
        """The position of the newest step."""
        if not self.parts:
            return ReadPosition()
        return ReadPosition(self.parts[-1].session, self.parts[-1].last)

    def rows_behind(self, position: ReadPosition) -> int:
        """Counts the steps after a position, void ones included."""
        known = {position.session: position.row}
        return sum(
            max(0, part.last - max(part.first - 1, known.get(part.session, -1)))
            for part in self.parts
            if part.session >= position.session
        )


@stable_name
class FolderSource:
    """A :class:`~gradwatch.record.columns.Source` that reads the folder anew at each call."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens a run folder.

        Raises:
            FileNotFoundError: If there is no such folder.
            ValueError: If it is not a run folder, is in a newer format, or parts are missing.
            ModuleNotFoundError: If pyarrow is not installed.
        """
        need_pyarrow("gradwatch.load()")
        self._open(Path(path))
        read_meta(self._folder)
        check_whole(self._folder)

    def _open(self, folder: Path) -> None:
        self._folder = folder
        self._starts = SessionStarts(folder / STEPS)
        self._parameters = ParameterReader(folder / PARAMETERS)

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder}  # the rest is a cache of what the folder holds

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._open(state["_folder"])

    def layout(self) -> Layout:
        """See :class:`~gradwatch.record.columns.Source`."""
        return read_meta(self._folder).layout

    def statistics(self) -> tuple[str, ...]:
        """See :class:`~gradwatch.record.columns.Source`."""
        return self.steadily(self._parameters.statistics)

    def steps(self, columns: Iterable[str], span: Span) -> Table:
        """See :class:`~gradwatch.record.columns.Source`."""
        wanted = tuple(columns)
        return self.steadily(lambda: self._steps(wanted, span))

    def parameters(
        self, indices: Sequence[int] | None, columns: Sequence[str], span: Span
    ) -> Table:
        """See :class:`~gradwatch.record.columns.Source`."""
        table = self.steadily(lambda: self._steps_and_parameters((), indices, columns, span)[1])
        return {name: column for name, column in table.items() if name != "place"}

    def steps_and_parameters(
        self,
        step_columns: Iterable[str],
        indices: Sequence[int] | None,
        columns: Sequence[str],
        span: Span,
    ) -> tuple[Table, Table]:
        """See :class:`~gradwatch.record.columns.Source`."""
        wanted = tuple(step_columns)
        return self.steadily(lambda: self._steps_and_parameters(wanted, indices, columns, span))

    def events(self) -> Sequence[Event]:
        """See :class:`~gradwatch.record.columns.Source`."""
        return self.steadily(lambda: list(self.new_events(self.listing(), {})))

    def groups(self) -> Sequence[ParameterGroups]:
        """See :class:`~gradwatch.record.columns.Source`."""
        return self.steadily(lambda: self._groups(self.listing()))

    def explanations(self) -> Sequence[Explanation]:
        """See :class:`~gradwatch.record.columns.Source`."""
        return [one.explanation for one in self.kept_explanations()]

    def kept_explanations(self) -> Sequence[KeptExplanation]:
        """Reads the explanations by step, with what is in the folder beside them."""
        from gradwatch.record.folder.explanations import read_explanations  # few runs need it

        kept = read_explanations(self._folder)
        return self.steadily(lambda: self._valid(kept)) if kept else ()

    def steadily(self, read: Callable[[], T]) -> T:
        """Calls ``read()``, and again if a file disappeared meanwhile.

        Raises:
            FileNotFoundError: If the folder is gone.
            ValueError: If it is no longer a run folder, or a file is damaged.
        """
        for _ in range(TRIES):
            # Most likely the file was merged into another; if not, the checks below say what is
            # missing.
            with suppress(FileNotFoundError):
                return read()
            read_meta(self._folder)
            check_whole(self._folder)
            time.sleep(PAUSE_S)
        return read()

    def listing(self) -> Listing:
        """Lists the parts that exist now, with the rule that says which steps are void."""
        parts = uncovered(list_parts(self._folder / STEPS))
        return Listing(parts, self._starts.rule(parts))

    def newest_steps(
        self, listing: Listing, behind: ReadPosition, columns: Sequence[str], most: int
    ) -> Table:
        """Reads the newest steps after a position; opens no more parts than it needs.

        Args:
            listing: The parts to read from.
            behind: Only steps after this position are returned.
            columns: Fields of :class:`~gradwatch.record.records.StepRecord`.
            most: Maximum number of steps; the newest are kept.
        """
        tables: list[Table] = []
        for part in reversed(listing.parts):
            enough = sum(len(table["row"]) for table in tables) >= most
            if enough or (part.session, part.last) <= behind:
                break
            table = self._part(part, ("row", *columns), listing.rule, Span())
            if part.session == behind.session:
                table = take_rows(table, array_of(table["row"]) > behind.row)
            tables.insert(0, table)
        return {name: _joined(name, [table[name] for table in tables])[-most:] for name in columns}

    def new_events(self, listing: Listing, offsets: dict[int, int]) -> Iterator[Event]:
        """Yields the events whose steps are in the listing.

        Args:
            listing: Events of later steps are left for a later call.
            offsets: By session, the offset in bytes up to which its file has been read; updated
                in place.
        """
        last = {part.session: part.last for part in listing.parts}
        notes: RankNotes | None = None
        for session, path in event_files(self._folder / EVENTS):
            for logged, end in read_events(path, offsets.get(session, 0)):
                # Rows never decrease along a file, so all later events must wait too.
                if logged.row > last.get(session, -1):
                    break
                offsets[session] = end
                if not listing.rule.keeps(session, logged.event):
                    continue
                if logged.event.rank < 0 and notes is None:
                    notes = RankNotes(self._folder, read_meta(self._folder).sessions)
                yield logged.event if notes is None else notes.traced(session, logged.event)

    def _valid(self, kept: Sequence[KeptExplanation]) -> list[KeptExplanation]:
        """Leaves out the explanations of void steps; they do not wait for their steps."""
        rule = self.listing().rule
        times = SessionTimes.of(read_meta(self._folder).sessions)
        return [
            one
            for one in kept
            if (of := one.session(times)) is not None and rule.keeps(of, one.explanation)
        ]

    def _steps(self, columns: Sequence[str], span: Span) -> dict[str, Column]:
        listing = self.listing()
        tables = [self._part(part, columns, listing.rule, span) for part in listing.parts]
        return {name: _joined(name, [table[name] for table in tables]) for name in columns}

    def _steps_and_parameters(
        self,
        step_columns: Sequence[str],
        indices: Sequence[int] | None,
        columns: Sequence[str],
        span: Span,
    ) -> tuple[Table, Table]:
        needed = ("session", "row", "step", "clip_coef")
        steps = self._steps(tuple(dict.fromkeys((*needed, *step_columns))), span)
        return steps, self._parameters.read(self.layout(), steps, indices, columns)

    def _groups(self, listing: Listing) -> list[ParameterGroups]:
        """Joins the parameter groups of all sessions, each from its own first step on."""
        meta, joined = read_meta(self._folder), list[ParameterGroups]()
        for session in dict.fromkeys(part.session for part in listing.parts):
            first = listing.rule.first_steps(session)
            mine = meta.groups(session)
            if mine is None:  # an earlier gradwatch, which did not write them
                mine = [ParameterGroups(label, 0, 2.0, (), ()) for label in first]
            # If there are several sessions, only what steps in this one replaces anything.
            mine = [one for one in mine if not first or one.optimizer in first]
            begun = {one.optimizer: first.get(one.optimizer, 0) for one in mine}
            joined = [one for one in joined if one.from_step < begun.get(one.optimizer, MAX_STEP)]
            joined += [
                replace(one, from_step=max(one.from_step, begun[one.optimizer])) for one in mine
            ]
        return joined

    def _part(
        self, part: Part, columns: Sequence[str], rule: ResumeRule, span: Span
    ) -> dict[str, Column]:
        """Reads the valid steps of one part; always includes ``step`` and ``optimizer``."""
        path = self._folder / STEPS / part.name
        file = open_parquet(path, STEP_LABELS)
        stored = [name for name in ("step", "optimizer", *columns) if name != "session"]
        with reading(path):
            table = _as_columns(_read_groups(file, _groups_with_steps(file, span), stored))
            rows = len(table["step"])
            table |= {name: _unwritten(name, rows) for name in stored if name not in table}
        table["session"] = np.full(rows, part.session)
        steps = array_of(table["step"])
        valid = rule.valid_steps(part.session, labels_in(table["optimizer"]), steps)
        return take_rows(table, span.holds(steps) & valid)


class ResumeRule:
    """Decides which steps are void, per optimizer: all from a later session's first step on.

    A run that was resumed from a checkpoint thus reads as one run. The steps that a killed process
    took after that checkpoint do not count.
    """

    def __init__(self, first: Mapping[int, Mapping[str, int]]) -> None:
        """Makes the rule.

        Args:
            first: The lowest step by session and optimizer; empty if there is only one session.
        """
        self._first = first
        self._labels = {label for steps in first.values() for label in steps}
        self._void_from: dict[int, dict[str, int]] = {}

    def void_from(self, session: int) -> Mapping[str, int]:
        """Returns, by optimizer, the first step that is void in a session."""
        if session not in self._void_from:
            void: dict[str, int] = {}
            for later, steps in self._first.items():
                if later > session:
                    _lower(void, steps)
            self._void_from[session] = void
        return self._void_from[session]

    def first_steps(self, session: int) -> Mapping[str, int]:
        """Returns a session's first step by optimizer; empty if there is only one session."""
        return self._first.get(session, {})

    def valid_steps(self, session: int, optimizers: Labels, steps: Array) -> Array:
        """Tells which rows of a session are valid: bool array ``[rows]``.

        Args:
            session: Number of the session, from 1.
            optimizers: Label of each row's optimizer.
            steps: int array ``[rows]``.
        """
        void = self.void_from(session)
        ends = np.array([void.get(label, MAX_STEP) for label in optimizers.values], np.int64)
        valid: Array = steps < ends[optimizers.codes]
        return valid

    def keeps(self, session: int, event: Event | Explanation) -> bool:
        """Tells whether an event or explanation counts, that is, whether its step is valid."""
        void = self.void_from(session)
        # Events about accumulation and memory belong to no optimizer (label "none"): the first void
        # step of any optimizer decides. But if no optimizer steps the model, "none" is also the
        # label of its backward passes, which have steps of their own.
        if event.optimizer == "none" and "none" not in self._labels:
            return event.step < min(void.values(), default=event.step + 1)
        return event.step < void.get(event.optimizer, event.step + 1)


@stable_name
class SessionStarts:
    """Finds the first step of each session and optimizer; reads each part only once."""

    def __init__(self, folder: Path) -> None:
        """Reads nothing yet.

        Args:
            folder: The ``steps`` folder of the run.
        """
        self._folder = folder
        self._of_part: dict[Part, dict[str, int]] = {}

    def rule(self, parts: Sequence[Part]) -> ResumeRule:
        """Makes the rule for these parts."""
        # With a single session no step is void, so there is no need to read anything.
        if len({part.session for part in parts}) < 2:
            return ResumeRule({})
        of_part = {part: self._of_part.get(part) or self._read(part) for part in parts}
        # Forget parts that are gone: a reader that follows a run for days sees many of them.
        self._of_part = of_part
        first: dict[int, dict[str, int]] = {}
        for part, steps in of_part.items():
            _lower(first.setdefault(part.session, {}), steps)
        return ResumeRule(first)

    def _read(self, part: Part) -> dict[str, int]:
        path = self._folder / part.name
        file = open_parquet(path, STEP_LABELS)
        with reading(path):
            groups = range(file.metadata.num_row_groups)
            table = _as_columns(_read_groups(file, groups, ("step", "optimizer")))
            steps, optimizers = array_of(table["step"]), labels_in(table["optimizer"])
        return {
            label: int(steps[mine].min())
            for code, label in enumerate(optimizers.values)
            if (mine := optimizers.codes == code).any()
        }


def _lower(lowest: dict[str, int], steps: Mapping[str, int]) -> None:
    for label, step in steps.items():
        lowest[label] = min(step, lowest.get(label, step))


def _unwritten(name: str, rows: int) -> Column:
    """Makes a column that an earlier gradwatch did not write: NaN, or the default of the record."""
    if name in EVERY_RUN_HAS:
        raise KeyError(name)
    dtype = STEP_DTYPES[name]  # a KeyError for "row", which every run has too
    if dtype is np.float64:
        return np.full(rows, np.nan)
    default = getattr(StepRecord(step=0), name)
    if dtype is None:
        return Labels((default,), np.zeros(rows, np.int64))
    if dtype is np.bool_:
        return Truths(np.full(rows, bool(default)), np.full(rows, default is not None))
    return np.full(rows, default, dtype)


def _joined(name: str, columns: Sequence[Column]) -> Column:
    """Concatenates a column over several parts; without parts it is empty."""
    dtype = STEP_DTYPES.get(name, np.int64)  # int64: session and row
    if dtype is np.bool_:
        return Truths.joined(list(map(truths_in, columns)))
    if dtype is not None:
        return np.concatenate([np.empty(0, dtype), *map(array_of, columns)])
    # Each part has its own dictionary: map the codes of all to one.
    code: dict[str, int] = {}
    codes = [np.empty(0, np.int64)]
    for labels in map(labels_in, columns):
        mapped = [code.setdefault(value, len(code)) for value in labels.values]
        codes.append(np.array(mapped, np.int64)[labels.codes])
    return Labels(tuple(code), np.concatenate(codes))


CLIPPED = "grad_norm_clipped"
Dtypes = Mapping[str, type[np.generic]]


@stable_name
class ParameterReader:
    """Reads norms and statistics per parameter for given steps."""

    def __init__(self, folder: Path) -> None:
        """Reads nothing yet.

        Args:
            folder: The ``parameters`` folder of the run.
        """
        self._folder = folder
        self._dtypes_of_part: dict[Part, Dtypes] = {}

    def statistics(self) -> tuple[str, ...]:
        """Returns the names of the statistics besides the norms, in the order they were added."""
        return tuple(name for name in self._dtypes(self._parts()) if name not in NORM_COLUMNS)

    def read(
        self, layout: Layout, steps: Table, indices: Sequence[int] | None, columns: Sequence[str]
    ) -> Table:
        """Reads columns of the given steps and parameters.

        Args:
            layout: Gives the order of the parameters.
            steps: ``session``, ``row``, ``step`` and ``clip_coef`` of the steps to read, in order.
            indices: Parameters by their index in the layout; None for all.
            columns: Norms or statistics.

        Returns:
            ``place`` (row in ``steps``), ``step``, ``parameter`` and the columns, in the order of
            ``steps`` and then the layout.
        """
        parts = self._parts()
        numbers = dict.fromkeys((*columns, *(["grad_norm"] if CLIPPED in columns else [])))
        known = self._dtypes(parts) | {"place": np.int64, "index": np.int64}
        dtypes = {name: known[name] for name in ("place", "index", *numbers)}
        parameters, places = _Parameters(layout, indices), _StepPlaces(steps)
        pieces = [{name: np.empty(0, dtype) for name, dtype in dtypes.items()}]
        pieces += [self._part(part, parameters, places, dtypes) for part in parts if part in places]
        table = {name: np.concatenate([piece[name] for piece in pieces]) for name in dtypes}
        order = _order(table["place"], table["index"])
        result: dict[str, Column] = {
            "place": table["place"][order],
            "step": array_of(steps["step"])[table["place"][order]],
            "parameter": Labels(layout.names, table["index"][order]),
        }
        return result | {name: table[name][order] for name in columns}

    def _part(
        self, part: Part, parameters: _Parameters, places: _StepPlaces, dtypes: Dtypes
    ) -> dict[str, Array]:
        """Reads the wanted rows of one part, as columns of the given dtypes."""
        path = self._folder / part.name
        file = open_parquet(path, PARAMETER_LABELS)
        with reading(path):
            arrow = _read_groups(file, parameters.groups(file), ("row", "parameter", *dtypes))
            table = _as_columns(arrow)
            place = places.find(part.session, array_of(table["row"]))
            index = parameters.find(labels_in(table.pop("parameter")))
        table |= {"place": place, "index": index}
        if CLIPPED in table:
            table["follows"] = arrow[CLIPPED].is_null().to_numpy()
        found = take_rows(table, (place >= 0) & (index >= 0))
        arrays = {name: array_of(column) for name, column in found.items()}
        # A part may lack a statistic that other parts have, or hold its norms as float32.
        unknown = np.full(len(arrays["place"]), np.nan)
        piece: dict[str, Array] = {
            name: arrays.get(name, unknown).astype(dtype, copy=False)
            for name, dtype in dtypes.items()
        }
        if CLIPPED in table:
            # A norm after the clip is stored only if it differs from the product. The product is
            # taken of the widened norms, as in the live history: rounding to float32 first would
            # give another value.
            derived = clipped_by(piece["grad_norm"], places.clip_coef[piece["place"]])
            piece[CLIPPED] = np.where(arrays["follows"], derived, piece[CLIPPED])
        return piece

    def _dtypes(self, parts: Sequence[Part]) -> dict[str, type[np.generic]]:
        """Returns the number columns with their dtypes: for each, the widest of any part."""
        dtypes: dict[str, type[np.generic]] = dict.fromkeys(NORM_COLUMNS, np.float32)
        of_parts = (column for part in parts for column in self._schema(part).items())
        return dtypes | {name: dtype for name, dtype in of_parts if dtype is np.float64}

    def _schema(self, part: Part) -> Dtypes:
        if part not in self._dtypes_of_part:
            schema = open_parquet(self._folder / part.name, PARAMETER_LABELS).schema_arrow
            self._dtypes_of_part[part] = {
                field.name: np.float32 if str(field.type) == "float" else np.float64
                for field in schema
                if field.name in NORM_COLUMNS or field.name not in KEYS
            }
        return self._dtypes_of_part[part]

    def _parts(self) -> list[Part]:
        return uncovered(list_parts(self._folder))


class _Parameters:
    """The parameters to read, found by name in a file."""

    def __init__(self, layout: Layout, indices: Sequence[int] | None) -> None:
        chosen = range(len(layout.names)) if indices is None else indices
        self._index = {safe_text(layout.names[index]): index for index in chosen}
        self._sorted = None if indices is None else sorted(self._index)

    def groups(self, file: Any) -> list[int]:
        """Finds the row groups that can hold one of the parameters."""
        if self._sorted is None:
            return list(range(file.metadata.num_row_groups))
        return _groups_with_names(file, self._sorted)

    def find(self, parameters: Labels) -> Array:
        """Returns the layout index of each row's parameter, or -1 if it is not wanted."""
        known = np.array([self._index.get(name, -1) for name in parameters.values], np.int64)
        found: Array = known[parameters.codes]
        return found


class _StepPlaces:
    """Maps the rows of each session to their places among the steps that are read."""

    def __init__(self, steps: Table) -> None:
        self.clip_coef = array_of(steps["clip_coef"])
        sessions, rows = array_of(steps["session"]), array_of(steps["row"])
        self._places: dict[int, tuple[int, Array]] = {}
        for session in np.unique(sessions).tolist():
            mine = np.flatnonzero(sessions == session)
            first = int(rows[mine].min())
            # A lookup table instead of a search: the rows of a session are nearly consecutive.
            places = np.full(int(rows[mine].max()) - first + 1, -1, np.int64)
            places[rows[mine] - first] = mine
            self._places[session] = first, places

    def __contains__(self, part: Part) -> bool:
        """Tells whether a part can hold one of the rows."""
        first, places = self._places.get(part.session, (0, np.empty(0, np.int64)))
        return bool((places[max(0, part.first - first) : max(0, part.last + 1 - first)] >= 0).any())

    def find(self, session: int, rows: Array) -> Array:
        """Returns the place of each row, or -1 if it is not wanted."""
        first, places = self._places[session]
        inside = (rows >= first) & (rows < first + len(places))
        return np.where(inside, places[np.where(inside, rows - first, 0)], -1)


SPARSE = 4
"""Slots per row up to which a places-by-indices matrix is faster than sorting."""


def _order(places: Array, indices: Array) -> Array:
    """Returns the order that sorts rows by place and then by index."""
    # If most places have most indices, put each row into its slot of a matrix: that takes a third
    # of the time of sorting.
    width = int(indices.max(initial=0)) + 1
    slots = (int(places.max(initial=0)) + 1) * width
    if slots <= SPARSE * len(places):
        matrix = np.full(slots, -1, np.int64)
        matrix[places * width + indices] = np.arange(len(places))
        order: Array = matrix[matrix >= 0]
        if len(order) == len(places):
            return order  # no slot was wanted twice
    return np.lexsort((indices, places))


def _groups_with_steps(file: Any, span: Span) -> list[int]:
    """Finds the row groups of a ``ParquetFile`` that can hold steps of a range."""
    groups = range(file.metadata.num_row_groups)
    if span == Span():
        return list(groups)
    bounds = (file.metadata.row_group(group).column(STEP_INDEX).statistics for group in groups)
    return [group for group, of in enumerate(bounds) if span.touches(of.min, of.max)]


def _groups_with_names(file: Any, names: Sequence[str]) -> list[int]:
    """Finds the row groups that can hold parameters; both the rows and the names are sorted."""
    metadata = file.metadata
    groups = range(metadata.num_row_groups)

    def bounds(group: int) -> tuple[str, str] | None:
        of = metadata.row_group(group).column(PARAMETER_INDEX).statistics
        # Parquet stores no bounds for a name of more than 4 kB.
        return (of.min, of.max) if of is not None and of.has_min_max else None

    if not names or not groups or bounds(0) is None or bounds(groups[-1]) is None:
        return list(groups) if names else []
    found = []
    # Bisect instead of scanning: reading the bounds of a group costs more than comparing them.
    first = bisect_left(groups, names[0], key=lambda group: (bounds(group) or ("", names[0]))[1])
    for group in groups[first:]:
        low, high = bounds(group) or (names[0], names[-1])
        if low > names[-1]:
            break
        place = bisect_left(names, low)
        if place < len(names) and names[place] <= high:
            found.append(group)
    return found


def _read_groups(file: Any, groups: Sequence[int], names: Iterable[str]) -> Any:
    """Reads row groups into a ``pyarrow.Table``, without the columns that the file lacks."""
    there = [name for name in dict.fromkeys(names) if name in file.schema_arrow.names]
    return file.read_row_groups(list(groups), columns=there, use_threads=False)


def _as_columns(table: Any) -> dict[str, Column]:
    """Converts a ``pyarrow.Table`` to columns; null numbers become NaN."""
    return {
        name: _as_column(column)
        for name, column in zip(table.column_names, table.columns, strict=True)
    }


def _as_column(column: Any) -> Column:
    kind = str(column.type)
    if kind == "bool":
        return truths_of(column)
    return labels_of(column) if kind.startswith("dictionary") else column.to_numpy()

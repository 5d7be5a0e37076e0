"""Records as columns: NumPy arrays by name, pandas data frames, and the sources of a History."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gradwatch.pickles import stable_name
from gradwatch.record.records import (
    NO_GRADIENT,
    Event,
    Layout,
    ParameterGroups,
    RecordBatch,
    StepRecord,
)

if TYPE_CHECKING:
    import pandas as pd

    from gradwatch.record.explanation import Explanation

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Labels:
    """A column of strings, stored as codes because few distinct strings repeat in many rows.

    Attributes:
        values: The distinct strings, each once.
        codes: int array ``[rows]``: index into ``values``.
    """

    values: Sequence[str]
    codes: NDArray[np.integer[Any]]

    @classmethod
    def from_strings(cls, strings: Iterable[str]) -> Labels:
        """Encodes one string per row. Codes follow the order of first appearance."""
        code: dict[str, int] = {}
        codes = [code.setdefault(text, len(code)) for text in strings]
        return cls(tuple(code), np.array(codes, np.int64))

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: Any) -> Labels:
        return Labels(self.values, self.codes[rows])


@dataclass(frozen=True, slots=True)
class Truths:
    """A column of truth values, of which some are unknown.

    Attributes:
        values: bool array ``[rows]``; False where it is unknown.
        known: bool array ``[rows]``.
    """

    values: NDArray[np.bool_]
    known: NDArray[np.bool_]

    @classmethod
    def of(cls, values: Sequence[bool | None]) -> Truths:
        """Makes the column of one value per row; None is unknown."""
        known = np.array([value is not None for value in values], bool)
        return cls(np.array(values, bool), known)  # bool(None) is False

    @classmethod
    def joined(cls, parts: Sequence[Truths]) -> Truths:
        """Concatenates columns; without any the result is empty."""
        none = np.empty(0, bool)
        values = np.concatenate([none, *(part.values for part in parts)])
        return cls(values, np.concatenate([none, *(part.known for part in parts)]))

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: Any) -> Truths:
        return Truths(self.values[rows], self.known[rows])

    def as_numbers(self) -> NDArray[np.float64]:
        """Returns 1 for true, 0 for false and NaN for unknown: ``[rows]``."""
        return np.where(self.known, self.values, np.nan)


Column = Array | Labels | Truths
Table = Mapping[str, Column]


def array_of(column: Column) -> Array:
    """Narrows the type of a column that must hold numbers.

    Raises:
        TypeError: If the column holds strings or truth values.
    """
    if isinstance(column, Labels | Truths):
        raise TypeError(f"expected a column of numbers, got {type(column).__name__}")
    return column


def truths_in(column: Column) -> Truths:
    """Narrows the type of a column that must hold truth values.

    Raises:
        TypeError: If the column holds something else.
    """
    if not isinstance(column, Truths):
        raise TypeError("expected a column of truth values")
    return column


def numbers_of(column: Column) -> Array:
    """Returns a column to calculate with: truth values as 1 and 0, NaN where they are unknown.

    Raises:
        TypeError: If the column holds strings.
    """
    return column.as_numbers() if isinstance(column, Truths) else array_of(column)


def labels_in(column: Column) -> Labels:
    """Narrows the type of a column that must hold strings.

    Raises:
        TypeError: If the column holds numbers.
    """
    if not isinstance(column, Labels):
        raise TypeError("expected a column of strings, got one of numbers")
    return column


def take_rows(table: Table, rows: Array) -> dict[str, Column]:
    """Selects rows from each column, by a bool mask ``[rows]`` or an int array of row numbers."""
    # Usually all rows are selected, and copying a million steps takes longer than reading them.
    if rows.dtype == np.bool_ and rows.all():
        return dict(table)
    return {name: column[rows] for name, column in table.items()}


def python_rows(table: Table) -> Iterator[tuple[Any, ...]]:
    """Yields each row as a tuple of Python values, in column order."""
    return zip(*map(_python_values, table.values()), strict=True)


def _python_values(column: Column) -> list[Any]:
    if isinstance(column, Labels):
        return [column.values[code] for code in column.codes]
    if isinstance(column, Truths):
        pairs = zip(column.values.tolist(), column.known.tolist(), strict=True)
        return [value if known else None for value, known in pairs]
    values: list[Any] = column.tolist()
    return values


def _dtypes(record: Any) -> dict[str, type[np.generic] | None]:
    """Maps each field of a record to the dtype of its column, or None for strings.

    A column of bool may hold unknown values: it is one of :class:`Truths`.
    """
    # Looked up by name: with postponed annotations, a dataclass field's type is only a string.
    of_type = {"int": np.int64, "float": np.float64, "bool | None": np.bool_}
    return {field.name: of_type.get(str(field.type)) for field in fields(record)}


STEP_DTYPES, EVENT_DTYPES = _dtypes(StepRecord), _dtypes(Event)

STEP_COLUMNS = tuple(
    name for name in STEP_DTYPES if name not in ("step", "global_step", "group_lr")
)
"""The columns of ``History.steps()``."""

NORM_COLUMNS = ("grad_norm", "grad_norm_clipped")
"""The columns that ``History.parameters()`` always has."""

EVENT_COLUMNS = tuple(name for name in EVENT_DTYPES if name != "global_step")
"""The columns of ``History.events()``."""


def step_table(records: Sequence[StepRecord], names: Iterable[str]) -> dict[str, Column]:
    """Converts step records to columns, named like their fields, with one row per record."""
    return {name: _column(records, name, STEP_DTYPES[name]) for name in names}


def _column(records: Sequence[object], name: str, dtype: type[np.generic] | None) -> Column:
    values = [getattr(record, name) for record in records]
    if dtype is None:
        return Labels.from_strings(values)
    return Truths.of(values) if dtype is np.bool_ else np.array(values, dtype)


@dataclass(frozen=True, slots=True)
class Span:
    """A half-open range of step numbers.

    Attributes:
        start: The first step in the range; None for no lower bound.
        stop: The step after the last one; None for no upper bound.
    """

    start: int | None = None
    stop: int | None = None

    def holds(self, steps: Array) -> NDArray[np.bool_]:
        """Returns a bool mask ``[rows]`` of the steps, int array ``[rows]``, in the range."""
        inside = np.ones(len(steps), bool)
        if self.start is not None:
            inside &= steps >= self.start
        if self.stop is not None:
            inside &= steps < self.stop
        return inside

    def touches(self, lowest: int, highest: int) -> bool:
        """Tells whether the range overlaps ``lowest`` to ``highest``, both included."""
        return (self.start is None or highest >= self.start) and (
            self.stop is None or lowest < self.stop
        )


ROWS_AT_ONCE = 2_000_000
"""Rows of :meth:`Source.parameters` that a reader of a whole run holds in memory at once."""


class Source(Protocol):
    """Records that can be read by column and by range of steps, oldest first."""

    def layout(self) -> Layout:
        """Returns the layout of the parameters."""

    def statistics(self) -> tuple[str, ...]:
        """Returns the names of the recorded per-parameter statistics other than the norms."""

    def steps(self, columns: Iterable[str], span: Span) -> Table:
        """Reads fields of the :class:`~gradwatch.record.records.StepRecord` of each step."""

    def parameters(
        self, indices: Sequence[int] | None, columns: Sequence[str], span: Span
    ) -> Table:
        """Reads per-parameter values.

        Args:
            indices: Parameters by their index in the layout; None for all.
            columns: Any of ``grad_norm``, ``grad_norm_clipped`` and the names in
                :meth:`statistics`.
            span: The range of steps to read.

        Returns:
            The columns ``step`` and ``parameter``, then the requested ones. There is one row for
            each step and each parameter that had a gradient in it. Rows are ordered by step, then
            by position in the layout.
        """

    def steps_and_parameters(
        self,
        step_columns: Iterable[str],
        indices: Sequence[int] | None,
        columns: Sequence[str],
        span: Span,
    ) -> tuple[Table, Table]:
        """Reads steps and per-parameter values of the same moment.

        Returns:
            What :meth:`steps` and :meth:`parameters` return. The second table also has a column
            ``place``: the row in the first one.
        """

    def events(self) -> Sequence[Event]:
        """Returns the events, oldest first."""

    def groups(self) -> Sequence[ParameterGroups]:
        """Returns the parameter groups of all optimizers, as in a batch."""

    def explanations(self) -> Sequence[Explanation]:
        """Returns the explanations of bad steps, oldest first."""


@stable_name
class LiveSource:
    """A :class:`Source` that reads what a watcher holds in memory at the moment of the call.

    A copy of it, pickled or deep-copied, holds what was in memory then.
    """

    def __init__(
        self, read: Callable[[], RecordBatch], explanations: Sequence[Explanation] = ()
    ) -> None:
        """Makes a source; nothing is read yet.

        Args:
            read: Returns a copy of the watcher's current records. Called on each read.
            explanations: Those of the watcher: the list that it adds to.
        """
        self._read = read
        self._explanations = explanations

    def __getstate__(self) -> tuple[RecordBatch, tuple[Explanation, ...]]:
        return self._read(), tuple(self._explanations)

    def __setstate__(
        self, state: tuple[RecordBatch, tuple[Explanation, ...]] | RecordBatch
    ) -> None:
        # Pickles of earlier versions hold the batch alone.
        batch, self._explanations = (state, ()) if isinstance(state, RecordBatch) else state
        self._read = lambda: batch

    def layout(self) -> Layout:
        """See :class:`Source`."""
        return self._read().layout

    def statistics(self) -> tuple[str, ...]:
        """See :class:`Source`."""
        return tuple(self._read().statistics)

    def steps(self, columns: Iterable[str], span: Span) -> Table:
        """See :class:`Source`."""
        return step_table(_within(self._read(), span).steps, columns)

    def parameters(
        self, indices: Sequence[int] | None, columns: Sequence[str], span: Span
    ) -> Table:
        """See :class:`Source`."""
        table = _parameter_table(_within(self._read(), span), indices, columns)
        return {name: column for name, column in table.items() if name != "place"}

    def steps_and_parameters(
        self,
        step_columns: Iterable[str],
        indices: Sequence[int] | None,
        columns: Sequence[str],
        span: Span,
    ) -> tuple[Table, Table]:
        """See :class:`Source`."""
        batch = _within(self._read(), span)
        return step_table(batch.steps, step_columns), _parameter_table(batch, indices, columns)

    def events(self) -> Sequence[Event]:
        """See :class:`Source`."""
        return self._read().events

    def groups(self) -> Sequence[ParameterGroups]:
        """See :class:`Source`."""
        return self._read().groups

    def explanations(self) -> Sequence[Explanation]:
        """See :class:`Source`."""
        return tuple(self._explanations)


def _parameter_table(
    batch: RecordBatch, indices: Sequence[int] | None, columns: Sequence[str]
) -> Table:
    chosen = np.arange(len(batch.layout.names)) if indices is None else np.array(indices, int)
    rows, places = np.nonzero(batch.norms[:, chosen] != NO_GRADIENT)
    where = (rows, chosen[places])
    planes = {
        **dict(zip(NORM_COLUMNS, (batch.norms, batch.clipped_norms), strict=True)),
        **batch.statistics,
    }
    table: dict[str, Column] = {
        "place": rows,
        "step": np.array([record.step for record in batch.steps], np.int64)[rows],
        "parameter": Labels(batch.layout.names, where[1]),
    }
    return table | {name: planes[name][where] for name in columns}


def _within(batch: RecordBatch, span: Span) -> RecordBatch:
    inside = span.holds(np.array([record.step for record in batch.steps], np.int64))
    if inside.all():
        return batch
    return replace(
        batch,
        steps=[record for record, kept in zip(batch.steps, inside, strict=True) if kept],
        norms=batch.norms[inside],
        clipped_norms=batch.clipped_norms[inside],
        statistics={name: plane[inside] for name, plane in batch.statistics.items()},
    )


def table_frame(table: Table, index: str | None = None) -> pd.DataFrame:
    """Makes a data frame whose dtypes do not depend on the values, even when it has no rows.

    Column ``index`` becomes the index; None keeps pandas' default index.

    Returns:
        One frame column per table column: int64, float32, float64, pandas' nullable boolean or
        pandas' string dtype.
    """
    import pandas as pd

    columns = {name: _values(column) for name, column in table.items() if name != index}
    rows = None if index is None else pd.Index(array_of(table[index]), name=index, dtype="int64")
    # No copy: the arrays belong to this frame alone, and copying a million steps takes longer than
    # reading them.
    frame: pd.DataFrame = pd.DataFrame(columns, index=rows, columns=list(columns), copy=False)
    return frame


def events_frame(events: Sequence[Event]) -> pd.DataFrame:
    """Makes a data frame of the :data:`EVENT_COLUMNS`, one row per event, oldest first."""
    return table_frame({name: _column(events, name, EVENT_DTYPES[name]) for name in EVENT_COLUMNS})


EXPLANATION_COLUMNS = (
    *("step", "optimizer", "micro_batch", "rank", "kind", "origin", "phase"),
    *("module", "module_class", "operation", "file", "line", "source"),
    *("argument", "parameter", "since_step", "examples", "count", "size"),
    *("largest_parameters", "largest_examples", "advice", "summary"),
)
"""The columns of ``History.explanations()``."""


def _column_of_tuples(values: Sequence[Sequence[object]]) -> Array:
    column = np.empty(len(values), object)
    for row, several in enumerate(values):
        column[row] = tuple(getattr(one, "name", one) for one in several)
    return column


def explanations_frame(explanations: Sequence[Explanation]) -> pd.DataFrame:
    """Makes a data frame of the :data:`EXPLANATION_COLUMNS`, one row per explanation."""
    from gradwatch.record.explanation import Explanation  # few runs need it

    dtypes = _dtypes(Explanation)
    table: dict[str, Column] = {}
    for name in EXPLANATION_COLUMNS:
        values = [getattr(one, name) for one in explanations]
        if dtypes.get(name) is not None:
            table[name] = np.array(values, dtypes[name])
        elif isinstance(getattr(Explanation(), name), tuple):
            table[name] = _column_of_tuples(values)
        else:
            table[name] = Labels.from_strings(value or "" for value in values)
    return table_frame(table)


def _values(column: Column) -> Any:
    if not isinstance(column, Labels | Truths):
        return column
    import pandas as pd

    if isinstance(column, Truths):
        # Not bool where all are known: what a frame holds would then depend on the values.
        return pd.arrays.BooleanArray(column.values, ~column.known)
    # take() on the codes makes a million strings as cheap as a million integers.
    return pd.Series(list(map(safe_text, column.values)), dtype="str").array.take(column.codes)


def safe_text(text: str) -> str:
    r"""Escapes lone surrogates, which UTF-8 cannot encode, as text such as ``\udc80``."""
    return text.encode("utf-8", "backslashreplace").decode()

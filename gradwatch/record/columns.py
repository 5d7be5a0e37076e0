"""Records as columns: arrays by name, pandas frames, and where a History reads them from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gradwatch.record.records import NO_GRADIENT, Event, Layout, RecordBatch, StepRecord

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Labels:
    """A column of strings that repeat.

    Attributes:
        values: The different strings, each once.
        codes: int array ``[rows]``: index into ``values``.
    """

    values: Sequence[str]
    codes: NDArray[np.integer[Any]]

    @classmethod
    def from_strings(cls, strings: Iterable[str]) -> Labels:
        """Codes strings, one per row, in the order in which they first appear."""
        code: dict[str, int] = {}
        codes = [code.setdefault(text, len(code)) for text in strings]
        return cls(tuple(code), np.array(codes, np.int64))

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: Any) -> Labels:
        return Labels(self.values, self.codes[rows])


Column = Array | Labels
Table = Mapping[str, Column]


def array_of(column: Column) -> Array:
    """Returns a column that is known to hold numbers.

    Raises:
        TypeError: If it holds strings.
    """
    if isinstance(column, Labels):
        raise TypeError("expected a column of numbers, got one of strings")
    return column


def labels_in(column: Column) -> Labels:
    """Returns a column that is known to hold strings.

    Raises:
        TypeError: If it holds numbers.
    """
    if not isinstance(column, Labels):
        raise TypeError("expected a column of strings, got one of numbers")
    return column


def take_rows(table: Table, rows: Array) -> dict[str, Column]:
    """Selects rows of each column.

    Args:
        table: Columns by name.
        rows: bool array ``[rows]``, or int array of the rows to take.
    """
    # Nearly always all rows stay, and a copy of a million steps takes longer than reading them.
    if rows.dtype == np.bool_ and rows.all():
        return dict(table)
    return {name: column[rows] for name, column in table.items()}


def python_rows(table: Table) -> Iterator[tuple[Any, ...]]:
    """Yields the rows as tuples of Python values, in the order of the columns."""
    return zip(*map(_python_values, table.values()), strict=True)


def _python_values(column: Column) -> list[Any]:
    if isinstance(column, Labels):
        return [column.values[code] for code in column.codes]
    values: list[Any] = column.tolist()
    return values


def _dtypes(record: Any) -> dict[str, type[np.generic] | None]:
    """Returns by field of a record the dtype of its column; None for strings."""
    # By the name of the type: with postponed annotations a dataclass knows no more of its fields.
    of_type = {"int": np.int64, "float": np.float64, "bool": np.bool_}
    return {field.name: of_type.get(str(field.type)) for field in fields(record)}


STEP_DTYPES, EVENT_DTYPES = _dtypes(StepRecord), _dtypes(Event)

STEP_COLUMNS = tuple(name for name in STEP_DTYPES if name not in ("step", "global_step"))
"""The columns of ``History.steps()``."""

NORM_COLUMNS = ("grad_norm", "grad_norm_clipped")
"""The columns of ``History.parameters()`` that are always there."""

EVENT_COLUMNS = tuple(name for name in EVENT_DTYPES if name != "global_step")
"""The columns of ``History.events()``."""


def step_table(records: Sequence[StepRecord], names: Iterable[str]) -> dict[str, Column]:
    """Makes columns of steps, one row per record.

    Args:
        records: The steps.
        names: Fields of :class:`~gradwatch.record.records.StepRecord`.
    """
    return {name: _column(records, name, STEP_DTYPES[name]) for name in names}


def _column(records: Sequence[object], name: str, dtype: type[np.generic] | None) -> Column:
    values = [getattr(record, name) for record in records]
    return Labels.from_strings(values) if dtype is None else np.array(values, dtype)


@dataclass(frozen=True, slots=True)
class Span:
    """A range of step numbers.

    Attributes:
        start: The first one; None for no bound.
        stop: One after the last; None for no bound.
    """

    start: int | None = None
    stop: int | None = None

    def holds(self, steps: Array) -> NDArray[np.bool_]:
        """Tells which steps, int array ``[rows]``, are in the range: bool array ``[rows]``."""
        inside = np.ones(len(steps), bool)
        if self.start is not None:
            inside &= steps >= self.start
        if self.stop is not None:
            inside &= steps < self.stop
        return inside

    def touches(self, lowest: int, highest: int) -> bool:
        """Tells whether a step between two, both included, can be in the range."""
        return (self.start is None or highest >= self.start) and (
            self.stop is None or lowest < self.stop
        )


class Source(Protocol):
    """Records that can be read by columns and by ranges of steps, oldest first."""

    def layout(self) -> Layout:
        """Returns the parameters."""

    def statistics(self) -> tuple[str, ...]:
        """Returns the names of the further statistics per parameter."""

    def steps(self, columns: Iterable[str], span: Span) -> Table:
        """Reads steps, one row each.

        Args:
            columns: Fields of :class:`~gradwatch.record.records.StepRecord`.
            span: Which steps.
        """

    def parameters(
        self, indices: Sequence[int] | None, columns: Sequence[str], span: Span
    ) -> Table:
        """Reads numbers per parameter.

        Args:
            indices: Parameters by their index in the layout; None for all.
            columns: Of ``grad_norm``, ``grad_norm_clipped`` and the further statistics.
            span: Which steps.

        Returns:
            ``step``, ``parameter`` and the columns: one row per step and parameter that had a
            gradient in it, in the order of the steps and within one in that of the layout.
        """

    def events(self) -> Sequence[Event]:
        """Returns the events."""


class LiveSource:
    """The :class:`Source` of what a watcher holds in memory now."""

    def __init__(self, read: Callable[[], RecordBatch]) -> None:
        """Reads from a watcher.

        Args:
            read: Copies out what is kept when it is called.
        """
        self._read = read

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
        batch = _within(self._read(), span)
        chosen = np.arange(len(batch.layout.names)) if indices is None else np.array(indices, int)
        rows, places = np.nonzero(batch.norms[:, chosen] != NO_GRADIENT)
        where = (rows, chosen[places])
        planes = {
            **dict(zip(NORM_COLUMNS, (batch.norms, batch.clipped_norms), strict=True)),
            **batch.statistics,
        }
        table: dict[str, Column] = {
            "step": np.array([record.step for record in batch.steps], np.int64)[rows],
            "parameter": Labels(batch.layout.names, where[1]),
        }
        return table | {name: planes[name][where] for name in columns}

    def events(self) -> Sequence[Event]:
        """See :class:`Source`."""
        return self._read().events


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
    """Makes a frame; its dtypes do not depend on what the rows hold, nor on whether there are any.

    Args:
        table: The columns by name.
        index: The column that becomes the index; None for a plain one.

    Returns:
        One column each: int64, float32 or float64, bool, and the dtype that pandas has for strings.
    """
    import pandas as pd

    columns = {name: _values(column) for name, column in table.items() if name != index}
    rows = None if index is None else pd.Index(array_of(table[index]), name=index, dtype="int64")
    # The arrays were made for this frame; a copy of a million steps takes longer than reading them.
    frame: pd.DataFrame = pd.DataFrame(columns, index=rows, columns=list(columns), copy=False)
    return frame


def events_frame(events: Sequence[Event]) -> pd.DataFrame:
    """Makes a frame with one row per event, oldest first, and the :data:`EVENT_COLUMNS`."""
    return table_frame({name: _column(events, name, EVENT_DTYPES[name]) for name in EVENT_COLUMNS})


def _values(column: Column) -> Any:
    if not isinstance(column, Labels):
        return column
    import pandas as pd

    # Taken by code, a million strings cost what a million integers cost.
    return pd.Series(list(map(safe_text, column.values)), dtype="str").array.take(column.codes)


def safe_text(text: str) -> str:
    r"""Replaces what UTF-8 has no bytes for, lone surrogates, by ``\udc80`` in letters."""
    return text.encode("utf-8", "backslashreplace").decode()

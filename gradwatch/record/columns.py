"""Columns: records as arrays by name, the form that frames and files are made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradwatch.record.step import StepRecord

Array = NDArray[Any]


def safe_text(text: str) -> str:
    r"""Replaces what UTF-8 has no bytes for, lone surrogates, by ``\udc80`` in letters.

    Args:
        text: Any string.
    """
    return text.encode("utf-8", "backslashreplace").decode()


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
    def of(cls, strings: Iterable[str]) -> Labels:
        """Codes strings in the order in which they first appear.

        Args:
            strings: One per row.
        """
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
    """Takes a column that is known to hold numbers.

    Args:
        column: The column.

    Raises:
        TypeError: If it holds strings.
    """
    if isinstance(column, Labels):
        raise TypeError("expected a column of numbers, got one of strings")
    return column


def labels_in(column: Column) -> Labels:
    """Takes a column that is known to hold strings.

    Args:
        column: The column.

    Raises:
        TypeError: If it holds numbers.
    """
    if not isinstance(column, Labels):
        raise TypeError("expected a column of strings, got one of numbers")
    return column


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
        """Tells which steps are in the range.

        Args:
            steps: int array ``[rows]``.

        Returns:
            bool array ``[rows]``.
        """
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


_DTYPES = {"int": np.int64, "float": np.float64, "bool": np.bool_}
STEP_DTYPES: dict[str, type[np.generic] | None] = {
    field.name: _DTYPES.get(str(field.type)) for field in fields(StepRecord)
}
"""By field of a StepRecord the dtype of its column; None for strings."""

STEP_COLUMNS = tuple(name for name in STEP_DTYPES if name not in ("step", "global_step"))
"""The columns of ``History.steps()``."""

NORM_COLUMNS = ("grad_norm", "grad_norm_clipped")
"""The columns of ``History.parameters()`` that are always there."""


def step_table(records: Sequence[StepRecord], names: Iterable[str]) -> dict[str, Column]:
    """Makes columns of steps.

    Args:
        records: One per row.
        names: Fields of :class:`~gradwatch.record.step.StepRecord`.

    Returns:
        The columns by name.
    """
    table: dict[str, Column] = {}
    for name in names:
        values = [getattr(record, name) for record in records]
        dtype = STEP_DTYPES[name]
        table[name] = Labels.of(values) if dtype is None else np.array(values, dtype)
    return table


def step_records(table: Table, rows: Array) -> list[StepRecord]:
    """Makes records of columns; fields without a column keep their defaults.

    Args:
        table: Columns by name, ``step`` among them.
        rows: int array: the rows to take.
    """
    values = [_objects(column[rows]) for column in table.values()]
    return [StepRecord(**dict(zip(table, row, strict=True))) for row in zip(*values, strict=True)]


def _objects(column: Column) -> list[Any]:
    if isinstance(column, Labels):
        return [column.values[code] for code in column.codes]
    objects: list[Any] = column.tolist()
    return objects

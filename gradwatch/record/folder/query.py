"""Reading parts of Parquet files: only the columns and row groups that are asked for."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gradwatch.record.columns import Array, Column, Labels, Span
from gradwatch.record.folder.arrow import labels_of
from gradwatch.record.folder.shelf import STEP

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

"""The table of steps: rows of a part, a part of rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradwatch.record.columns import STEP_DTYPES, Labels, step_table
from gradwatch.record.folder.arrow import dictionary, options, read_parquet
from gradwatch.record.step import StepRecord

LABELS = ("optimizer", "outcome")
MOSTLY_NAN = ("hessian_eigenvalue", "hessian_trace")
"""Columns that few steps have a number in."""
REPEATING = (*LABELS, "weight", "clip_coef", "clip_threshold", "lr", "loss_scale", *MOSTLY_NAN)
ROW_GROUP = 1 << 16


class StepsTable:
    """How steps are written, read and put together."""

    folder = "steps"

    def of(self, records: Sequence[StepRecord], first_row: int) -> Any:
        """Makes the rows of some steps.

        Args:
            records: The steps.
            first_row: Row of the first one in its session.

        Returns:
            A ``pyarrow.Table``.
        """
        import pyarrow as pa

        rows = np.arange(first_row, first_row + len(records), dtype=np.int64)
        columns = {"row": pa.array(rows)}
        for name, column in step_table(records, STEP_DTYPES).items():
            columns[name] = dictionary(column) if isinstance(column, Labels) else pa.array(column)
        return pa.table(columns)

    def size(self, rows: int, columns: int) -> int:
        """Returns how many values are worth counting in a table of so many rows and columns."""
        return max(1, rows * columns)

    def encode(self, table: Any, small: bool) -> Any:
        """Writes rows as a Parquet file into memory.

        Args:
            table: The rows.
            small: Whether to write fast rather than small.

        Returns:
            A ``pyarrow.Buffer``.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        sink = pa.BufferOutputStream()
        chosen = options(pa, table.schema, REPEATING, small)
        pq.write_table(table, sink, row_group_size=ROW_GROUP, **chosen)
        return sink.getvalue()

    def read(self, paths: Sequence[Path]) -> Any:
        """Reads whole parts.

        Args:
            paths: The files, in the order of their rows.

        Returns:
            One ``pyarrow.Table`` with the rows of all.
        """
        import pyarrow as pa

        return pa.concat_tables([read_parquet(path, LABELS) for path in paths]).unify_dictionaries()

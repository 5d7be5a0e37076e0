"""The table of parameters: one row per step and parameter, sorted by name and then by step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradwatch.record.batch import NO_GRADIENT, Layout, RecordBatch, clipped_by
from gradwatch.record.columns import Array, Labels, safe_text
from gradwatch.record.folder.arrow import dictionary, labels_of, options, read_parquet

LABELS = ("optimizer", "parameter")
ROW_GROUP = 1 << 14
KEYS = ("row", "step", "optimizer", "parameter", "grad_norm", "grad_norm_clipped")


class ParametersTable:
    """How numbers per parameter are written, read and put together."""

    folder = "parameters"

    def __init__(self) -> None:
        """Starts without a model."""
        self._layout: Layout | None = None
        self._names: list[str] = []
        self._order: Array = np.empty(0, np.int64)
        self._ranks: Array = np.empty(0, np.int32)

    def of(self, batch: RecordBatch, first_row: int) -> Any:
        """Makes the rows of some steps.

        Args:
            batch: The steps.
            first_row: Row of the first one in its session.

        Returns:
            A ``pyarrow.Table``; ``parameter`` is a dictionary whose values are sorted.
        """
        import pyarrow as pa

        self._sort_names(batch.layout)
        norms = batch.norms[:, self._order].T
        places, steps = np.nonzero(norms != NO_GRADIENT)
        where = (steps, self._order[places])
        clipped = _where_measured(batch, where)
        statistics = {
            name: pa.array(plane[where].astype(np.float64), from_pandas=True)
            for name, plane in batch.statistics.items()
        }
        numbers = np.array([record.step for record in batch.steps], np.int64)
        optimizers = Labels.of(record.optimizer for record in batch.steps)
        return pa.table(
            {
                "row": pa.array(steps + first_row),
                "step": pa.array(numbers[steps]),
                "optimizer": dictionary(optimizers[steps]),
                "parameter": dictionary(Labels(self._names, self._ranks[places])),
                "grad_norm": pa.array(norms[places, steps]),
                "grad_norm_clipped": clipped,
                **statistics,
            }
        )

    def size(self, rows: int, columns: int) -> int:
        """Returns how many values are worth counting in a table of so many rows and columns."""
        return max(1, rows * (columns - len(KEYS) + 1))

    def encode(self, table: Any, small: bool) -> Any:
        """Writes rows as a Parquet file into memory.

        Args:
            table: The rows, sorted.
            small: Whether to write fast rather than small.

        Returns:
            A ``pyarrow.Buffer``.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        sink = pa.BufferOutputStream()
        chosen = options(pa, table.schema, LABELS, small)
        with pq.ParquetWriter(sink, table.schema, **chosen) as writer:
            for group in _row_groups(table):
                writer.write_table(group)
        return sink.getvalue()

    def read(self, paths: Sequence[Path]) -> Any:
        """Reads whole parts.

        Args:
            paths: The files, in the order of their rows.

        Returns:
            One ``pyarrow.Table`` with the rows of all, sorted.
        """
        import pyarrow as pa

        tables = [read_parquet(path, LABELS) for path in paths]
        table = pa.concat_tables(tables, promote_options="permissive")
        return _sorted(table.unify_dictionaries().combine_chunks())

    def _sort_names(self, layout: Layout) -> None:
        if self._layout is layout:
            return
        names = list(map(safe_text, layout.names))
        order = sorted(range(len(names)), key=names.__getitem__)
        self._layout, self._order = layout, np.array(order, np.int64)
        self._names = sorted(set(names))
        rank = {name: index for index, name in enumerate(self._names)}
        self._ranks = np.array([rank[names[index]] for index in order], np.int32)


def _where_measured(batch: RecordBatch, where: tuple[Array, Array]) -> Any:
    """Leaves the norms after the clip out where they follow from those before."""
    import pyarrow as pa

    norms, clipped = batch.norms[where], batch.clipped_norms[where]
    coefficients = np.array([record.clip_coef for record in batch.steps], np.float64)
    derived = clipped_by(norms, coefficients[where[0]])
    same = (clipped == derived) & (np.signbit(clipped) == np.signbit(derived))
    follows = same | (np.isnan(clipped) & np.isnan(derived))
    return pa.array(clipped.astype(norms.dtype, copy=False), mask=follows)


def _sorted(table: Any) -> Any:
    """Sorts rows by name, keeping their order within each."""
    import pyarrow as pa

    parameters = labels_of(table["parameter"])
    names, codes = parameters.values, parameters.codes
    order = sorted(range(len(names)), key=names.__getitem__)
    rank = np.empty(len(names), np.int32)
    rank[order] = np.arange(len(names), dtype=np.int32)
    ranks = rank[codes]
    # numpy sorts 16 bits by their digits, in linear time.
    rows = np.argsort(ranks.astype(np.uint16) if len(names) < 1 << 16 else ranks, kind="stable")
    sorted_names = pa.array([names[index] for index in order], pa.string())
    parameter = pa.DictionaryArray.from_arrays(ranks[rows], sorted_names)
    place = table.schema.get_field_index("parameter")
    others = table.remove_column(place).take(pa.array(rows))
    return others.add_column(place, "parameter", parameter)


def _row_groups(table: Any) -> Iterator[Any]:
    """Cuts the rows; each piece gets a dictionary of the names in it only."""
    import pyarrow as pa

    parameters = labels_of(table["parameter"])
    names, codes = parameters.values, parameters.codes
    place = table.schema.get_field_index("parameter")
    for first in range(0, table.num_rows, ROW_GROUP):
        piece, mine = table.slice(first, ROW_GROUP), codes[first : first + ROW_GROUP]
        there = pa.array(names[mine[0] : mine[-1] + 1], pa.string())
        parameter = pa.DictionaryArray.from_arrays(mine - mine[0], there)
        yield piece.set_column(place, "parameter", parameter)

"""The tables of steps and of parameters as Parquet files, with pyarrow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from gradwatch.record.columns import (
    STEP_DTYPES,
    Array,
    Column,
    Labels,
    Truths,
    safe_text,
    step_table,
)
from gradwatch.record.folder.arrow import arrow_texts, arrow_values
from gradwatch.record.folder.files import UnreadableError
from gradwatch.record.records import NO_GRADIENT, Layout, RecordBatch, StepRecord, clipped_by
from gradwatch.record.schema import columns_of

STEP_LABELS = tuple(name for name, dtype in STEP_DTYPES.items() if dtype is None)
PARAMETER_LABELS = ("optimizer", "parameter")
"""The string columns of each table, stored and read as dictionaries."""

EVERY_RUN_HAS = (
    *("step", "optimizer", "parameter", "micro_batches", "clipped", "outcome"),
    *("nonfinite_parameters", "global_step"),
)
"""Columns that were there from the first version of the format on, besides numbers that may be NaN.

A file without one is damaged; one without a column that was declared later is old.
"""

KEYS = ("row", "step", "optimizer", "parameter", "grad_norm", "grad_norm_clipped")
"""The columns that every table of parameters has; the others are statistics."""

STEP_INDEX = 1
"""Index of the column ``step`` in both tables; Parquet keeps bounds by column index."""

PARAMETER_INDEX = 3
"""Index of the column ``parameter`` in the table of parameters."""

# Columns that declare ``repeats``: dictionary and run-length encoding make them nearly free.
_REPEATING = tuple(name for name, one in columns_of(StepRecord).items() if one.repeats)
_STEP_ROW_GROUP = 1 << 16
# The curve of one parameter reads whole row groups: small ones waste less of that, but there are
# more bounds to look at.
_PARAMETER_ROW_GROUP = 1 << 14

MISSING = "{user} needs pyarrow, which is not installed. Run: pip install 'gradwatch[runs]'"
DAMAGED = "{path!r} is damaged: {why}. Copy it again, or delete it to read the rest of the run."


def need_pyarrow(user: str, *, later: bool = False) -> None:
    """Checks that pyarrow is installed.

    Args:
        user: The call that needs it, for the message: ``"gradwatch.load()"``.
        later: Whether to leave the import, which takes 0.1 s, to the first use.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    try:
        if later and find_spec("pyarrow") is not None:
            return
        import pyarrow.parquet  # noqa: F401
    except ModuleNotFoundError as error:
        # If pyarrow itself is broken and lacks a module, keep the original message.
        if error.name not in ("pyarrow", "pyarrow.parquet"):
            raise
        raise ModuleNotFoundError(MISSING.format(user=user), name="pyarrow") from error


class StepsTable:
    """Writes and reads whole parts of the table of steps."""

    def to_arrow(self, records: Sequence[StepRecord], first_row: int) -> Any:
        """Makes a ``pyarrow.Table`` with one row per record.

        Args:
            records: Consecutive steps of one session.
            first_row: Row of the first of them in the session.
        """
        import pyarrow as pa

        rows = np.arange(first_row, first_row + len(records), dtype=np.int64)
        columns = {"row": arrow_values(rows)}
        for name, column in step_table(records, STEP_DTYPES).items():
            columns[name] = _to_arrow(column)
        return pa.table(columns)

    def size(self, rows: int, columns: int) -> int:
        """Returns how many values a table of that many rows and columns counts for in a merge."""
        return max(1, rows * columns)

    def encode(self, table: Any, small: bool) -> Any:
        """Encodes rows as a Parquet file in memory, a ``pyarrow.Buffer``.

        Args:
            table: A ``pyarrow.Table``.
            small: Whether the file will soon be merged; then encoding is fast rather than compact.
        """
        return _encode(table.schema, [table], _REPEATING, small)

    def read(self, paths: Sequence[Path]) -> Any:
        """Reads whole files, given in the order of their rows, into one ``pyarrow.Table``."""
        import pyarrow as pa

        tables = [_read_parquet(path, STEP_LABELS) for path in paths]
        return pa.concat_tables(tables).unify_dictionaries()


class ParametersTable:
    """Writes and reads whole parts of the table of parameters, sorted by name and then by row."""

    def __init__(self) -> None:
        self._layout: Layout | None = None
        self._names: list[str] = []
        self._order: Array = np.empty(0, np.int64)
        self._ranks: Array = np.empty(0, np.int32)

    def to_arrow(self, batch: RecordBatch, first_row: int) -> Any:
        """Makes a ``pyarrow.Table`` of the steps of a batch; ``parameter`` is a sorted dictionary.

        Args:
            batch: Consecutive steps of one session.
            first_row: Row of the first of them in the session.
        """
        import pyarrow as pa

        self._sort_names(batch.layout)
        norms = batch.norms[:, self._order].T
        places, steps = np.nonzero(norms != NO_GRADIENT)
        where = (steps, self._order[places])
        statistics = {
            # NaN (a statistic that was not measured) becomes null.
            name: arrow_values(plane[where].astype(np.float64), ~np.isnan(plane[where]))
            for name, plane in batch.statistics.items()
        }
        numbers = np.array([record.step for record in batch.steps], np.int64)
        optimizers = Labels.from_strings(record.optimizer for record in batch.steps)
        return pa.table(
            {
                "row": arrow_values(steps + first_row),
                "step": arrow_values(numbers[steps]),
                "optimizer": _dictionary(optimizers[steps]),
                "parameter": _dictionary(Labels(self._names, self._ranks[places])),
                "grad_norm": arrow_values(norms[places, steps]),
                "grad_norm_clipped": _clipped_where_measured(batch, where),
                **statistics,
            }
        )

    def size(self, rows: int, columns: int) -> int:
        """Returns how many values a table of that many rows and columns counts for in a merge."""
        # Of the key columns only the norm takes space: the others are sorted, constant or null.
        return max(1, rows * (columns - len(KEYS) + 1))

    def encode(self, table: Any, small: bool) -> Any:
        """Encodes sorted rows as a Parquet file in memory; see :meth:`StepsTable.encode`."""
        return _encode(table.schema, _row_groups(table), PARAMETER_LABELS, small)

    def read(self, paths: Sequence[Path]) -> Any:
        """Reads whole files, given in order of their rows, into one sorted ``pyarrow.Table``."""
        import pyarrow as pa

        tables = [_read_parquet(path, PARAMETER_LABELS) for path in paths]
        # Permissive: a part may have float64 norms, or a statistic that another part lacks.
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


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns errors in the block, which reads one file, into one that names the damaged file.

    Raises:
        FileNotFoundError: If the file is gone.
        ValueError: If it is not a complete Parquet file, or lacks a column that it must have.
    """
    import pyarrow as pa

    try:
        yield
    except FileNotFoundError:  # not damage, but a merge: the caller lists the folder again
        raise
    except KeyError as error:
        why = f"it has no column {_column_name(error)!r}"
        raise UnreadableError(DAMAGED.format(path=str(path), why=why)) from error
    except (OSError, pa.ArrowException) as error:
        why = str(error).rstrip(".")
        raise UnreadableError(DAMAGED.format(path=str(path), why=why)) from error


def _column_name(error: KeyError) -> str:
    name = error.args[0] if error.args else ""
    # pyarrow's own KeyErrors hold the name as bytes.
    return name.decode(errors="replace") if isinstance(name, bytes) else str(name)


def open_parquet(path: Path, strings: Sequence[str]) -> Any:
    """Opens a Parquet file as a ``pyarrow.parquet.ParquetFile``.

    Args:
        path: A ``.parquet`` file.
        strings: String columns to be read as dictionaries.

    Raises:
        FileNotFoundError: If the file is gone.
        ValueError: If it is not a complete Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with reading(path):
        try:
            return pq.ParquetFile(pa.OSFile(str(path)), read_dictionary=list(strings))
        except KeyError as error:
            if _column_name(error) in EVERY_RUN_HAS:
                raise
            # A file from before the column was declared.
            written = pq.ParquetFile(pa.OSFile(str(path))).schema_arrow.names
            there = [name for name in strings if name in written]
            return pq.ParquetFile(pa.OSFile(str(path)), read_dictionary=there)


def truths_of(column: Any) -> Truths:
    """Returns the truth values of a boolean ``pyarrow.ChunkedArray``; null is unknown."""
    return Truths(column.fill_null(False).to_numpy(), column.is_valid().to_numpy())


def labels_of(column: Any) -> Labels:
    """Returns the labels of a dictionary-encoded ``pyarrow.ChunkedArray``, of any chunks."""
    import pyarrow as pa

    chunks = [chunk for chunk in column.unify_dictionaries().chunks if len(chunk)]
    if not chunks:
        return Labels((), np.empty(0, np.int32))
    # Not to_numpy(), which imports pandas.
    codes = np.concatenate([np.from_dlpack(chunk.indices) for chunk in chunks])
    values = chunks[-1].dictionary
    if values.type != pa.string():
        values = values.cast(pa.string())
    return Labels(values.to_pylist(), codes.astype(np.int32, copy=False))


def _read_parquet(path: Path, strings: Sequence[str]) -> Any:
    with reading(path):
        # No extra threads: the training keeps its cores while the run is written.
        return open_parquet(path, strings).read(use_threads=False)


def _to_arrow(column: Column) -> Any:
    if isinstance(column, Labels):
        return _dictionary(column)
    if isinstance(column, Truths):
        return arrow_values(column.values, column.known)
    return arrow_values(column)


def _dictionary(labels: Labels) -> Any:
    import pyarrow as pa

    values = arrow_texts(list(map(safe_text, labels.values)))
    return pa.DictionaryArray.from_arrays(arrow_values(labels.codes.astype(np.int32)), values)


def _encode(schema: Any, pieces: Iterable[Any], repeating: Sequence[str], small: bool) -> Any:
    """Writes tables one after another; the ``repeating`` columns are stored as dictionaries."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    # The training waits for small parts, and they are merged soon: prefer speed. Measured for 64
    # steps of 300 parameters: 1.6 ms instead of 2.4 ms, and 4 % more bytes.
    codec = {"compression": "lz4"} if small else {"compression": "zstd", "compression_level": 1}
    encodings = {field.name: _encoding(field.type) for field in schema}
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        schema,
        **codec,
        use_dictionary=list(repeating),
        column_encoding={
            name: how for name, how in encodings.items() if how and name not in repeating
        },
        # Arrow's copy of the schema would take a kilobyte or two in each part; nobody needs it.
        store_schema=False,
        # The default of 1 MiB would drop the dictionary if names are very long (10 kB).
        dictionary_pagesize_limit=1 << 26,
    ) as writer:
        for piece in pieces:
            writer.write_table(piece, row_group_size=_STEP_ROW_GROUP)
    return sink.getvalue()


def _encoding(kind: Any) -> str | None:
    from pyarrow import types

    if types.is_integer(kind):
        return "DELTA_BINARY_PACKED"  # rows and steps count up: differences take almost no bits
    if types.is_floating(kind):
        return "BYTE_STREAM_SPLIT"  # lossless; exponents side by side compress well
    return None


def _clipped_where_measured(batch: RecordBatch, where: tuple[Array, Array]) -> Any:
    """Returns the norms after the clip; null where they are the norm before times clip_coef."""
    norms, clipped = batch.norms[where], batch.clipped_norms[where]
    coefficients = np.array([record.clip_coef for record in batch.steps], np.float64)
    derived = clipped_by(norms, coefficients[where[0]])
    # Compare so that the same values are read back: -0.0 equals 0.0, and NaN equals nothing.
    same = (clipped == derived) & (np.signbit(clipped) == np.signbit(derived))
    follows = same | (np.isnan(clipped) & np.isnan(derived))
    return arrow_values(clipped.astype(norms.dtype, copy=False), ~follows)


def _sorted(table: Any) -> Any:
    """Sorts rows by parameter name; a stable sort, so rows stay in order within a name."""
    import pyarrow as pa

    parameters = labels_of(table["parameter"])
    names, codes = parameters.values, parameters.codes
    order = sorted(range(len(names)), key=names.__getitem__)
    rank = np.empty(len(names), np.int32)
    rank[order] = np.arange(len(names), dtype=np.int32)
    ranks = rank[codes]
    # numpy sorts 16-bit integers with a radix sort, in linear time.
    rows = np.argsort(ranks.astype(np.uint16) if len(names) < 1 << 16 else ranks, kind="stable")
    sorted_names = arrow_texts([names[index] for index in order])
    parameter = pa.DictionaryArray.from_arrays(arrow_values(ranks[rows]), sorted_names)
    return _with_parameter(table.drop_columns(["parameter"]).take(arrow_values(rows)), parameter)


def _row_groups(table: Any) -> Iterator[Any]:
    """Cuts sorted rows into row groups."""
    import pyarrow as pa

    parameters = labels_of(table["parameter"])
    others = table.drop_columns(["parameter"])
    for first in range(0, table.num_rows, _PARAMETER_ROW_GROUP):
        codes = parameters.codes[first : first + _PARAMETER_ROW_GROUP]
        # Each group gets only the names that occur in it: with 100,000 parameters, the full list
        # would be larger than the numbers.
        names = arrow_texts(parameters.values[codes[0] : codes[-1] + 1])
        parameter = pa.DictionaryArray.from_arrays(arrow_values(codes - codes[0]), names)
        yield _with_parameter(others.slice(first, _PARAMETER_ROW_GROUP), parameter)


def _with_parameter(others: Any, parameter: Any) -> Any:
    return others.add_column(PARAMETER_INDEX, "parameter", parameter)

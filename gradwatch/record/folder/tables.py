"""The tables of steps and of parameters as Parquet, through pyarrow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from gradwatch.record.columns import STEP_DTYPES, Array, Labels, safe_text, step_table
from gradwatch.record.folder.files import UnreadableError
from gradwatch.record.records import NO_GRADIENT, Layout, RecordBatch, StepRecord, clipped_by
from gradwatch.record.schema import columns_of

STEP_LABELS = tuple(name for name, dtype in STEP_DTYPES.items() if dtype is None)
PARAMETER_LABELS = ("optimizer", "parameter")
"""The columns of strings of each table: stored, written and read as dictionaries."""

KEYS = ("row", "step", "optimizer", "parameter", "grad_norm", "grad_norm_clipped")
"""The columns that every table of parameters has; the others are statistics."""

STEP_INDEX = 1
"""Place of the column ``step`` in both tables, where its bounds are found."""

PARAMETER_INDEX = 3
"""Place of the column ``parameter`` in its table."""

# As a dictionary and its runs they take next to nothing.
_REPEATING = tuple(name for name, one in columns_of(StepRecord).items() if one.repeats)
_STEP_ROW_GROUP = 1 << 16
# One parameter's curve reads whole groups: small ones waste less, and cost more bounds to look at.
_PARAMETER_ROW_GROUP = 1 << 14

MISSING = "{user} needs pyarrow, which is not installed. Run: pip install 'gradwatch[runs]'"
DAMAGED = "{path!r} is damaged: {why}. Copy it anew, or delete it to read what else there is."


def need_pyarrow(user: str) -> None:
    """Checks that pyarrow is there.

    Args:
        user: What needs it, as the user wrote it.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ModuleNotFoundError as error:
        # A broken pyarrow that misses a module of its own keeps its own message.
        if error.name not in ("pyarrow", "pyarrow.parquet"):
            raise
        raise ModuleNotFoundError(MISSING.format(user=user), name="pyarrow") from error


class StepsTable:
    """How steps are written, and read as a whole."""

    def to_arrow(self, records: Sequence[StepRecord], first_row: int) -> Any:
        """Makes a ``pyarrow.Table`` of some steps.

        Args:
            records: The steps.
            first_row: Row of the first one in its session.
        """
        import pyarrow as pa

        rows = np.arange(first_row, first_row + len(records), dtype=np.int64)
        columns = {"row": pa.array(rows)}
        for name, column in step_table(records, STEP_DTYPES).items():
            columns[name] = _dictionary(column) if isinstance(column, Labels) else pa.array(column)
        return pa.table(columns)

    def size(self, rows: int, columns: int) -> int:
        """Returns how many values are worth counting in a table of so many rows and columns."""
        return max(1, rows * columns)

    def encode(self, table: Any, small: bool) -> Any:
        """Writes rows as a Parquet file into memory, a ``pyarrow.Buffer``.

        Args:
            table: The rows.
            small: Whether the file is small and soon merged: then it is written fast.
        """
        return _encode(table.schema, [table], _REPEATING, small)

    def read(self, paths: Sequence[Path]) -> Any:
        """Reads whole files, in the order of their rows, into one ``pyarrow.Table``."""
        import pyarrow as pa

        tables = [_read_parquet(path, STEP_LABELS) for path in paths]
        return pa.concat_tables(tables).unify_dictionaries()


class ParametersTable:
    """How numbers per parameter are written, and read as a whole: sorted by name, then by row."""

    def __init__(self) -> None:
        self._layout: Layout | None = None
        self._names: list[str] = []
        self._order: Array = np.empty(0, np.int64)
        self._ranks: Array = np.empty(0, np.int32)

    def to_arrow(self, batch: RecordBatch, first_row: int) -> Any:
        """Makes a ``pyarrow.Table`` of some steps; ``parameter`` is a sorted dictionary.

        Args:
            batch: The steps.
            first_row: Row of the first one in its session.
        """
        import pyarrow as pa

        self._sort_names(batch.layout)
        norms = batch.norms[:, self._order].T
        places, steps = np.nonzero(norms != NO_GRADIENT)
        where = (steps, self._order[places])
        statistics = {
            # from_pandas: NaN, a statistic that was not taken, becomes null.
            name: pa.array(plane[where].astype(np.float64), from_pandas=True)
            for name, plane in batch.statistics.items()
        }
        numbers = np.array([record.step for record in batch.steps], np.int64)
        optimizers = Labels.from_strings(record.optimizer for record in batch.steps)
        return pa.table(
            {
                "row": pa.array(steps + first_row),
                "step": pa.array(numbers[steps]),
                "optimizer": _dictionary(optimizers[steps]),
                "parameter": _dictionary(Labels(self._names, self._ranks[places])),
                "grad_norm": pa.array(norms[places, steps]),
                "grad_norm_clipped": _clipped_where_measured(batch, where),
                **statistics,
            }
        )

    def size(self, rows: int, columns: int) -> int:
        """Returns how many values are worth counting in a table of so many rows and columns."""
        # Of the keys only the norm takes room: the others are sorted, constant or null.
        return max(1, rows * (columns - len(KEYS) + 1))

    def encode(self, table: Any, small: bool) -> Any:
        """Writes sorted rows as a Parquet file into memory; see :meth:`StepsTable.encode`."""
        return _encode(table.schema, _row_groups(table), PARAMETER_LABELS, small)

    def read(self, paths: Sequence[Path]) -> Any:
        """Reads whole files, in the order of their rows, into one sorted ``pyarrow.Table``."""
        import pyarrow as pa

        tables = [_read_parquet(path, PARAMETER_LABELS) for path in paths]
        # Permissive: of two parts one may have wide norms, or a statistic that the other lacks.
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
    """Says of a file that is damaged which one it is.

    Args:
        path: The file that is read in the block.

    Raises:
        FileNotFoundError: If it is gone.
        ValueError: If it is no whole Parquet file, or has not the columns that it must have.
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
    # pyarrow's own errors have it as bytes.
    return name.decode(errors="replace") if isinstance(name, bytes) else str(name)


def open_parquet(path: Path, strings: Sequence[str]) -> Any:
    """Opens a Parquet file as a ``pyarrow.parquet.ParquetFile``.

    Args:
        path: The file.
        strings: Columns of strings, to be read as dictionaries.

    Raises:
        FileNotFoundError: If it is gone.
        ValueError: If it is no whole Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with reading(path):
        return pq.ParquetFile(pa.OSFile(str(path)), read_dictionary=list(strings))


def labels_of(column: Any) -> Labels:
    """Returns the labels of a ``pyarrow.ChunkedArray`` of dictionaries, one or one per chunk."""
    import pyarrow as pa

    chunks = [chunk for chunk in column.unify_dictionaries().chunks if len(chunk)]
    if not chunks:
        return Labels((), np.empty(0, np.int32))
    codes = np.concatenate([chunk.indices.to_numpy() for chunk in chunks])
    values = chunks[-1].dictionary
    return Labels(values.cast(pa.string()).to_pylist(), codes.astype(np.int32, copy=False))


def _read_parquet(path: Path, strings: Sequence[str]) -> Any:
    with reading(path):
        # On this thread: a training that writes its run keeps its cores.
        return open_parquet(path, strings).read(use_threads=False)


def _dictionary(labels: Labels) -> Any:
    import pyarrow as pa

    values = pa.array(list(map(safe_text, labels.values)), pa.string())
    return pa.DictionaryArray.from_arrays(labels.codes.astype(np.int32), values)


def _encode(schema: Any, pieces: Iterable[Any], repeating: Sequence[str], small: bool) -> Any:
    """Writes tables one behind the other; ``repeating`` are columns to store as dictionaries."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Fast for the parts that a training waits for and that are merged soon; measured, 64 steps of
    # 300 parameters: 1.6 ms against 2.4 ms, and 4 % more bytes.
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
        # Arrow's copy of the schema is a kilobyte or two in each part, and nobody needs it.
        store_schema=False,
        # A name of 10 kB is no reason to give up the dictionary.
        dictionary_pagesize_limit=1 << 26,
    ) as writer:
        for piece in pieces:
            writer.write_table(piece, row_group_size=_STEP_ROW_GROUP)
    return sink.getvalue()


def _encoding(kind: Any) -> str | None:
    from pyarrow import types

    if types.is_integer(kind):
        return "DELTA_BINARY_PACKED"  # rows and steps count up: nearly no bits
    if types.is_floating(kind):
        return "BYTE_STREAM_SPLIT"  # exponents side by side compress; losslessly
    return None


def _clipped_where_measured(batch: RecordBatch, where: tuple[Array, Array]) -> Any:
    """Returns the norms after the clip, null where they follow from those before."""
    import pyarrow as pa

    norms, clipped = batch.norms[where], batch.clipped_norms[where]
    coefficients = np.array([record.clip_coef for record in batch.steps], np.float64)
    derived = clipped_by(norms, coefficients[where[0]])
    # -0.0 equals 0.0, and NaN does not equal itself: what is read back has the same bits.
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
    return _with_parameter(table.drop_columns(["parameter"]).take(pa.array(rows)), parameter)


def _row_groups(table: Any) -> Iterator[Any]:
    """Cuts sorted rows into row groups."""
    import pyarrow as pa

    parameters = labels_of(table["parameter"])
    others = table.drop_columns(["parameter"])
    for first in range(0, table.num_rows, _PARAMETER_ROW_GROUP):
        codes = parameters.codes[first : first + _PARAMETER_ROW_GROUP]
        # Each group gets the names that are in it only: with all of them it would be larger than
        # its numbers, where a model has 100,000.
        names = pa.array(parameters.values[codes[0] : codes[-1] + 1], pa.string())
        parameter = pa.DictionaryArray.from_arrays(codes - codes[0], names)
        yield _with_parameter(others.slice(first, _PARAMETER_ROW_GROUP), parameter)


def _with_parameter(others: Any, parameter: Any) -> Any:
    return others.add_column(PARAMETER_INDEX, "parameter", parameter)

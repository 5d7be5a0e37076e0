"""The tables of steps and of parameters as Parquet, through pyarrow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from gradwatch.record.columns import STEP_DTYPES, Array, Labels, safe_text, step_table
from gradwatch.record.folder.files import UnreadableError
from gradwatch.record.records import NO_GRADIENT, Layout, RecordBatch, StepRecord, clipped_by

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
        if error.name not in ("pyarrow", "pyarrow.parquet"):
            raise
        raise ModuleNotFoundError(MISSING.format(user=user), name="pyarrow") from error


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
    except FileNotFoundError:
        raise
    except KeyError as error:
        why = f"it has no column {_name(error)!r}"
        raise UnreadableError(DAMAGED.format(path=str(path), why=why)) from error
    except (OSError, pa.ArrowException) as error:
        why = str(error).rstrip(".")
        raise UnreadableError(DAMAGED.format(path=str(path), why=why)) from error


def _name(error: KeyError) -> str:
    """Takes the name out of the error; that of pyarrow has it as bytes."""
    name = error.args[0] if error.args else ""
    return name.decode(errors="replace") if isinstance(name, bytes) else str(name)


def open_parquet(path: Path, strings: Sequence[str]) -> Any:
    """Opens a Parquet file.

    Args:
        path: The file.
        strings: Columns of strings, to be read as dictionaries.

    Returns:
        A ``pyarrow.parquet.ParquetFile``.

    Raises:
        FileNotFoundError: If it is gone.
        ValueError: If it is no whole Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with reading(path):
        return pq.ParquetFile(pa.OSFile(str(path)), read_dictionary=list(strings))


def read_parquet(path: Path, strings: Sequence[str]) -> Any:
    """Reads a whole Parquet file on this thread; arguments and errors of :func:`open_parquet`.

    Args:
        path: The file.
        strings: Columns of strings, to be read as dictionaries.

    Returns:
        A ``pyarrow.Table``.
    """
    with reading(path):
        return open_parquet(path, strings).read(use_threads=False)


def options(arrow: ModuleType, schema: Any, labels: Sequence[str], small: bool) -> dict[str, Any]:
    """Chooses how the columns of a table are written.

    Args:
        arrow: The module ``pyarrow``.
        schema: Schema of the table.
        labels: Columns whose values repeat.
        small: Whether to write fast rather than small.

    Returns:
        Arguments of ``pyarrow.parquet.ParquetWriter``.
    """
    # Fast for the parts that a training waits for and that are merged soon; measured, 64 steps of
    # 300 parameters: 1.6 ms against 2.4 ms, and 4 % more bytes.
    codec = {"compression": "lz4"} if small else {"compression": "zstd", "compression_level": 1}
    encodings = {
        field.name: encoding
        for field in schema
        if field.name not in labels and (encoding := _encoding(arrow.types, field.type))
    }
    return {
        **codec,
        "use_dictionary": list(labels),
        "column_encoding": encodings,
        "store_schema": False,
        # A name of 10 kB is no reason to give up the dictionary.
        "dictionary_pagesize_limit": 1 << 26,
    }


def _encoding(types: Any, kind: Any) -> str | None:
    if types.is_integer(kind):
        return "DELTA_BINARY_PACKED"  # rows and steps count up: nearly no bits
    if types.is_floating(kind):
        return "BYTE_STREAM_SPLIT"  # exponents side by side compress; losslessly
    return None


def dictionary(labels: Labels) -> Any:
    """Makes an Arrow column of labels.

    Args:
        labels: The column.

    Returns:
        A ``pyarrow.DictionaryArray`` of strings.
    """
    import pyarrow as pa

    values = pa.array(list(map(safe_text, labels.values)), pa.string())
    return pa.DictionaryArray.from_arrays(labels.codes.astype(np.int32), values)


def labels_of(column: Any) -> Labels:
    """Takes the labels out of an Arrow column.

    Args:
        column: A ``pyarrow.ChunkedArray`` of dictionaries; each chunk may have its own.
    """
    import pyarrow as pa

    chunks = [chunk for chunk in column.unify_dictionaries().chunks if len(chunk)]
    if not chunks:
        return Labels((), np.empty(0, np.int32))
    codes = np.concatenate([chunk.indices.to_numpy() for chunk in chunks])
    values = chunks[-1].dictionary
    return Labels(values.cast(pa.string()).to_pylist(), codes.astype(np.int32, copy=False))


STEP_LABELS = ("optimizer", "outcome")
MOSTLY_NAN = ("hessian_eigenvalue", "hessian_trace")
"""Columns that few steps have a number in."""
REPEATING = (*STEP_LABELS, "weight", "clip_coef", "clip_threshold", "lr", "loss_scale", *MOSTLY_NAN)
STEP_ROW_GROUP = 1 << 16


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
        pq.write_table(table, sink, row_group_size=STEP_ROW_GROUP, **chosen)
        return sink.getvalue()

    def read(self, paths: Sequence[Path]) -> Any:
        """Reads whole parts.

        Args:
            paths: The files, in the order of their rows.

        Returns:
            One ``pyarrow.Table`` with the rows of all.
        """
        import pyarrow as pa

        return pa.concat_tables(
            [read_parquet(path, STEP_LABELS) for path in paths]
        ).unify_dictionaries()


PARAMETER_LABELS = ("optimizer", "parameter")
PARAMETER_ROW_GROUP = 1 << 14
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
        chosen = options(pa, table.schema, PARAMETER_LABELS, small)
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

        tables = [read_parquet(path, PARAMETER_LABELS) for path in paths]
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
    for first in range(0, table.num_rows, PARAMETER_ROW_GROUP):
        piece, mine = (
            table.slice(first, PARAMETER_ROW_GROUP),
            codes[first : first + PARAMETER_ROW_GROUP],
        )
        there = pa.array(names[mine[0] : mine[-1] + 1], pa.string())
        parameter = pa.DictionaryArray.from_arrays(mine - mine[0], there)
        yield piece.set_column(place, "parameter", parameter)

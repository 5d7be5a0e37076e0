"""pyarrow, imported when a run folder is first used, and what all tables share of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from gradwatch.record.columns import Labels, safe_text
from gradwatch.record.folder.unreadable import UnreadableError

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

"""Writers: pieces of a table as CSV, JSON or Parquet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradwatch.commands.shared.as_json import as_json

if TYPE_CHECKING:
    import pandas as pd

Pieces = Iterable[Any]
"""Of ``pandas.DataFrame``."""

JSON_ROWS = 1 << 14


def csv_text(pieces: Iterable[pd.DataFrame]) -> Iterator[str]:
    """Writes CSV.

    Args:
        pieces: Frames with the same columns.

    Yields:
        Text: the names of the columns first; every digit of each number, an empty cell for NaN.
    """
    for place, piece in enumerate(pieces):
        yield str(piece.to_csv(None, index=False, header=place == 0, lineterminator="\n"))


def json_text(pieces: Iterable[pd.DataFrame]) -> Iterator[str]:
    """Writes JSON, an array with one object per row.

    Args:
        pieces: Frames with the same columns.

    Yields:
        Text; NaN is null, and infinities are strings.
    """
    yield "["
    between = "\n"
    for piece in pieces:
        for first in range(0, len(piece), JSON_ROWS):
            records = piece.iloc[first : first + JSON_ROWS].to_dict("records")
            yield between + ",\n".join(map(as_json, records))
            between = ",\n"
    yield "\n]\n"


def write_text(
    pieces: Iterable[pd.DataFrame], path: Path, text: Callable[[Pieces], Iterator[str]]
) -> int:
    """Writes a file of text in UTF-8.

    Args:
        pieces: Frames with the same columns.
        path: The file.
        text: :func:`csv_text` or :func:`json_text`.

    Returns:
        The number of rows.
    """
    count = _Count(pieces)
    with path.open("w", encoding="utf-8", newline="") as file:
        file.writelines(text(count))
    return count.rows


def write_parquet(pieces: Iterable[pd.DataFrame], path: Path) -> int:
    """Writes one Parquet file.

    Args:
        pieces: Frames with the same columns.
        path: The file.

    Returns:
        The number of rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = 0
    writer, schema = None, None
    try:
        for piece in pieces:
            table = pa.Table.from_pandas(piece, schema=schema, preserve_index=False)
            if writer is None:
                schema = table.schema.remove_metadata()
                writer = pq.ParquetWriter(str(path), schema)
            writer.write_table(table.cast(schema))
            rows += table.num_rows
    finally:
        if writer is not None:
            writer.close()
    return rows


class _Count:
    """Counts rows as they pass."""

    def __init__(self, pieces: Iterable[pd.DataFrame]) -> None:
        self._pieces = pieces
        self.rows = 0

    def __iter__(self) -> Iterator[pd.DataFrame]:
        for piece in self._pieces:
            self.rows += len(piece)
            yield piece

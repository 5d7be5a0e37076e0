"""``gradwatch export``: a table of a run as one file for other tools."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradwatch.cli.arguments import (
    FINE,
    CommandError,
    Commands,
    add_command,
    add_json,
    add_run,
    open_run,
    run_name,
    written_whole,
)
from gradwatch.cli.terminal import Output, as_json, printable_lines
from gradwatch.wording import counted, printable

if TYPE_CHECKING:
    import pandas as pd

    from gradwatch.history import History


TABLES = ("steps", "parameters", "events")
ROWS = 1 << 20
"""Rows of the table of parameters in one piece, about."""
SLICE = 1 << 16
"""Rows of the other tables in one piece."""


def pieces(history: History, table: str) -> Iterator[pd.DataFrame]:
    """Reads a table; there is always a first piece, which tells the columns.

    Args:
        history: The run.
        table: One of :data:`TABLES`.

    Yields:
        Frames with the same columns; steps have ``step`` as a column.
    """
    if table == "steps":
        yield from _slices(history.steps().reset_index())
    elif table == "events":
        yield from _slices(history.events())
    else:
        yield from _parameters(history)


def _slices(frame: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Cuts a frame that is there: its text would take several times its room."""
    for first in range(0, max(1, len(frame)), SLICE):
        yield frame.iloc[first : first + SLICE]


def _parameters(history: History) -> Iterator[pd.DataFrame]:
    """Reads ranges of steps, up to the one that is the last now: the run may grow meanwhile."""
    steps = history.steps(()).index
    if not len(steps):
        yield history.parameters()
        return
    first, last = int(steps.min()), int(steps.max())
    in_piece = max(1, ROWS // max(1, len(history.names)))
    for start in range(first, last + 1, in_piece):
        yield history.parameters(start=start, stop=min(start + in_piece, last + 1))


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


FORMATS = ("csv", "parquet", "json")
STDOUT = "-"
TEXT: dict[str, Callable[[Any], Any]] = {"csv": csv_text, "json": json_text}

DESCRIPTION = """\
Writes one table of a run as one file.

tables:
  steps       one row per optimizer step
  parameters  one row per step and parameter that had a gradient in it
  events      NaN, Inf, spikes, skipped steps and the like

Without -o, CSV and JSON go to standard output. pandas, DuckDB and Polars also read the
Parquet files in the run folder as they are."""

EXAMPLES = """\
gradwatch export runs/a -o steps.csv
gradwatch export runs/a --table parameters -o parameters.parquet
gradwatch export runs/a --table events --format json | jq '.[] | select(.kind == "nan")'"""


def add_to(commands: Commands) -> None:
    """Adds the command.

    Args:
        commands: The commands of the parser.
    """
    parser = add_command(
        commands, "export", "a table of a run as CSV, Parquet or JSON", DESCRIPTION, EXAMPLES
    )
    add_run(parser)
    parser.add_argument(
        "--format", choices=FORMATS, help="default: what the suffix of FILE says, or else csv"
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", default=STDOUT, help="file to write; - for stdout"
    )
    parser.add_argument("--table", choices=TABLES, default=TABLES[0], help="default: %(default)s")
    add_json(parser, "what was written")
    parser.set_defaults(run_command=run)


def run(arguments: argparse.Namespace, out: Output) -> int:
    """Runs the command.

    Args:
        arguments: What the user typed.
        out: Where to write.

    Returns:
        The exit code.
    """
    form = _format(arguments)
    history = open_run(arguments.run)
    if arguments.output == STDOUT:
        _print(history, arguments.table, form, out)
    else:
        rows = _write(history, arguments, form)
        _tell(arguments, form, rows, out)
    return FINE


def _format(arguments: argparse.Namespace) -> str:
    suffix = Path(arguments.output).suffix.lower().removeprefix(".")
    form: str = arguments.format or (suffix if suffix in FORMATS else "")
    if not form and suffix:
        raise CommandError(
            f"-o {arguments.output!r} does not tell the format. Add --format {'|'.join(FORMATS)}."
        )
    if arguments.output == STDOUT and form == "parquet":
        raise CommandError("--format parquet needs a file. Add -o FILE.")
    if arguments.output == STDOUT and arguments.json:
        raise CommandError(
            "--json tells of a file. Add -o FILE, or use --format json for the rows."
        )
    return form or "csv"


def _print(history: History, table: str, form: str, out: Output) -> None:
    """Prints; a terminal is not told what a name tells it to do."""
    for text in TEXT[form](pieces(history, table)):
        out.write(printable_lines(text) if out.is_terminal else text)
        if out.closed:
            return


def _write(history: History, arguments: argparse.Namespace, form: str) -> int:
    with written_whole(arguments.output, arguments.run) as path:
        table = pieces(history, arguments.table)
        if form == "parquet":
            return write_parquet(table, path)
        return write_text(table, path, TEXT[form])


def _tell(arguments: argparse.Namespace, form: str, rows: int, out: Output) -> None:
    if arguments.json:
        content = {
            "run": run_name(arguments.run),
            "table": arguments.table,
            "format": form,
            "file": arguments.output,
            "rows": rows,
        }
        out.line(as_json(content, indent=2))
    else:
        what = f"{counted(rows, 'row')} of {arguments.table} as {form}"
        out.line(f"Wrote {printable(arguments.output)} ({what})")

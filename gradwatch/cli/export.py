"""``gradwatch export``: writes a table of a run as one file for other tools."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gradwatch.cli.arguments import (
    FINE,
    RUN,
    CommandError,
    Commands,
    add_command,
    open_run,
    run_folder,
    tell_written,
    written_whole,
)
from gradwatch.cli.terminal import Output, as_json, printable_lines
from gradwatch.record.wording import counted

if TYPE_CHECKING:
    import pandas as pd

    from gradwatch.history import History

_TABLES = ("steps", "parameters", "events")
_FORMATS = ("csv", "parquet", "json")
_STDOUT = "-"

ROWS = 1 << 20
"""Approximate number of rows of the table of parameters to read at once."""
SLICE = 1 << 16
"""Rows of the other tables to write at once; these tables are in memory already."""
JSON_ROWS = 1 << 14
"""Rows to convert to Python objects at once; objects take far more memory than a data frame."""

_DESCRIPTION = """\
Writes one table of a run as one file.

tables:
  steps       one row per optimizer step
  parameters  one row per step and parameter, where there was a gradient
  events      NaN, Inf, skipped steps and so on

Without -o, CSV and JSON go to standard output. pandas, DuckDB and Polars can also read
the Parquet files in the run folder directly."""

_EXAMPLES = """\
gradwatch export runs/a -o steps.csv
gradwatch export runs/a --table parameters -o parameters.parquet
gradwatch export runs/a --table events --format json | jq '.[] | select(.kind == "nan")'"""


def add_to(commands: Commands) -> None:
    """Adds the command to the parser."""
    summary = "a table of a run as CSV, Parquet or JSON"
    parser = add_command(commands, "export", run, summary, _DESCRIPTION, _EXAMPLES)
    parser.add_argument("run", metavar="RUN", help=RUN)
    form, file = "default: by the suffix of FILE, or csv", "file to write; - for stdout"
    parser.add_argument("--format", choices=_FORMATS, help=form)
    parser.add_argument("-o", "--output", metavar="FILE", default=_STDOUT, help=file)
    parser.add_argument("--table", choices=_TABLES, default=_TABLES[0], help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def run(arguments: argparse.Namespace, out: Output) -> int:
    """Writes the table; returns the exit code."""
    form, table = _format(arguments), arguments.table
    history = open_run(arguments.run)
    if arguments.output == _STDOUT:
        _print(history, table, form, out)
        return FINE
    with written_whole(arguments.output, run_folder(arguments.run)) as path:
        rows = _write(pieces(history, table), form, path)
    content = {"table": table, "format": form, "file": arguments.output, "rows": rows}
    tell_written(arguments, out, content, f"{counted(rows, 'row')} of {table} as {form}")
    return FINE


def _format(arguments: argparse.Namespace) -> str:
    suffix = Path(arguments.output).suffix.lower().removeprefix(".")
    form: str = arguments.format or (suffix if suffix in _FORMATS else "")
    if not form and suffix:
        raise CommandError(
            f"-o {arguments.output!r} does not tell the format. Add --format {'|'.join(_FORMATS)}."
        )
    if arguments.output == _STDOUT and form == "parquet":
        raise CommandError("--format parquet needs a file. Add -o FILE.")
    if arguments.output == _STDOUT and arguments.json:
        raise CommandError(
            "--json describes the file written. Add -o FILE, or use --format json for the rows."
        )
    return form or "csv"


def pieces(history: History, table: str) -> Iterator[pd.DataFrame]:
    """Reads a table in pieces; there is always at least one, so that the columns are known.

    Yields:
        Data frames with the same columns; for steps, ``step`` is a column.
    """
    if table == "parameters":
        yield from _parameters(history)
        return
    frame = history.steps().reset_index() if table == "steps" else history.events()
    # In slices, although it is in memory: its text would take several times as much.
    for first in range(0, max(1, len(frame)), SLICE):
        yield frame.iloc[first : first + SLICE]


def _parameters(history: History) -> Iterator[pd.DataFrame]:
    """Reads ranges of steps, up to the step that is the last now: the run may still grow."""
    steps = history.steps(()).index
    if not len(steps):
        yield history.parameters()
        return
    first, last = int(steps.min()), int(steps.max())
    in_piece = max(1, ROWS // max(1, len(history.names)))
    for start in range(first, last + 1, in_piece):
        yield history.parameters(start=start, stop=min(start + in_piece, last + 1))


def _with_none(piece: pd.DataFrame) -> pd.DataFrame:
    """Replaces the unknown truth values of a frame by None, which JSON knows."""
    unsure = piece.select_dtypes("boolean").astype(object)
    plain: pd.DataFrame = piece.assign(**dict(unsure.where(unsure.notna(), None).items()))
    return plain


def _csv_text(pieces: Iterable[pd.DataFrame]) -> Iterator[str]:
    """Yields CSV with a header; numbers have all their digits, NaN and unknown are empty cells."""
    for index, piece in enumerate(pieces):
        yield str(piece.to_csv(None, index=False, header=index == 0, lineterminator="\n"))


def _json_text(pieces: Iterable[pd.DataFrame]) -> Iterator[str]:
    """Yields a JSON array with one object per row; NaN and unknown are null, infinities strings."""
    yield "["
    between = "\n"
    for piece in map(_with_none, pieces):
        for first in range(0, len(piece), JSON_ROWS):
            records = piece.iloc[first : first + JSON_ROWS].to_dict("records")
            yield between + ",\n".join(map(as_json, records))
            between = ",\n"
    yield "\n]\n"


_TEXT: dict[str, Callable[[Iterable[pd.DataFrame]], Iterator[str]]]
_TEXT = {"csv": _csv_text, "json": _json_text}


def _print(history: History, table: str, form: str, out: Output) -> None:
    for text in _TEXT[form](pieces(history, table)):
        # Names may hold control characters: escape them for a terminal, but not in a file.
        out.write(printable_lines(text) if out.is_terminal else text)
        if out.closed:
            return


def _write(pieces: Iterable[pd.DataFrame], form: str, path: Path) -> int:
    """Writes a file; returns the number of rows."""
    if form == "parquet":
        return _write_parquet(pieces, path)
    rows = 0

    def counting() -> Iterator[pd.DataFrame]:
        nonlocal rows
        for piece in pieces:
            rows += len(piece)
            yield piece

    # newline="" keeps line breaks unchanged, also on Windows.
    with path.open("w", encoding="utf-8", newline="") as file:
        file.writelines(_TEXT[form](counting()))
    return rows


def _write_parquet(pieces: Iterable[pd.DataFrame], path: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = 0
    writer, schema = None, None
    try:
        for piece in pieces:
            # The first piece sets the types: a column without values in a later one would differ.
            table = pa.Table.from_pandas(piece, schema=schema, preserve_index=False)
            if writer is None:
                # The metadata of pandas would describe the first piece only, with its row count.
                schema = table.schema.remove_metadata()
                writer = pq.ParquetWriter(str(path), schema)
            writer.write_table(table.cast(schema))
            rows += table.num_rows
    finally:
        if writer is not None:
            writer.close()
    return rows

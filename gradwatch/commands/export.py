"""``gradwatch export``: a table of a run as one file for other tools."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradwatch.commands.exporting.pieces import TABLES, pieces
from gradwatch.commands.exporting.writers import csv_text, json_text, write_parquet, write_text
from gradwatch.commands.shared.arguments import Commands, add_command, add_json, add_run
from gradwatch.commands.shared.as_json import as_json
from gradwatch.commands.shared.command_error import CommandError
from gradwatch.commands.shared.exit_code import FINE
from gradwatch.commands.shared.numbers import counted
from gradwatch.commands.shared.opened import open_run, run_name
from gradwatch.commands.shared.output import Output
from gradwatch.commands.shared.printable import printable, printable_lines
from gradwatch.commands.shared.target import written_whole

if TYPE_CHECKING:
    from gradwatch.history import History

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

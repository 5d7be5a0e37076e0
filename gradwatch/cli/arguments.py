"""What several commands share: arguments, exit codes, errors, a run to read, a file to write."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradwatch.cli.terminal import Output, as_json
from gradwatch.pickles import stable_name
from gradwatch.record.folder.meta import NAME, TABLES
from gradwatch.report.finding import printable

if TYPE_CHECKING:
    from gradwatch.history import History


@stable_name
class CommandError(Exception):
    """Wrong usage, or a run or a file that cannot be used; the command ends with exit code 2."""


FINE = 0
FINDINGS = 1
"""The report has findings that ``--fail-on`` names."""
PROBLEM = 2
"""Wrong usage, a run that cannot be read, or a file that cannot be written."""
INTERRUPTED = 130
"""Ctrl-C, but for ``tail``, which ends so: 0."""
TERMINATED = 143

RUN = "folder of the run, as given to watch(run_dir=)"

Commands = Any
"""What ``ArgumentParser.add_subparsers()`` returns; argparse keeps the class to itself."""


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace, Output], int],
    summary: str,
    description: str,
    examples: str,
) -> argparse.ArgumentParser:
    """Adds a command.

    Args:
        commands: The commands of the parser.
        name: What the user types.
        run: Runs it, with what the user typed and where to write; returns the exit code.
        summary: A few words for the list of commands.
        description: Some sentences for its own help.
        examples: Lines to be copied.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog="examples:\n" + "".join(f"  {line}\n" for line in examples.splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # An abbreviation in a script would break with the next option that begins like it.
        allow_abbrev=False,
    )
    parser.set_defaults(run_command=run)
    return parser


def at_least_one(text: str) -> int:
    """Reads a number of things, for ``add_argument(type=)``."""
    # int() alone takes "1_000", " 7 " and the digits of other scripts.
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def open_run(path: str) -> History:
    """Opens the run in a folder, as the user typed it.

    Raises:
        CommandError: If it is not there, or no run folder.
        OSError: If it may not be read.
        ModuleNotFoundError: If pyarrow is not installed.
    """
    # Here, for pandas and pyarrow take a second to load, and --help needs neither.
    from gradwatch.history import load
    from gradwatch.record.folder.files import UnreadableError

    if not path:
        raise CommandError("RUN is empty. Name the folder of a run, such as runs/a.")
    try:
        return load(path)
    except (UnreadableError, FileNotFoundError) as error:
        raise CommandError(str(error)) from error


def run_name(path: str) -> str:
    """Returns how the run is called in what is shown."""
    return path.rstrip(os.sep) or path


@contextmanager
def written_whole(target: str, run: str) -> Iterator[Path]:
    """Gives a file to write to, and puts it in place when that has succeeded.

    Args:
        target: The file that the user names; it is replaced.
        run: The run folder.

    Yields:
        A file beside the target, with the same suffix.

    Raises:
        CommandError: If the target is a folder, is in no folder, or belongs to the run.
    """
    path = Path(target)
    _check_target(path, Path(run))
    # Nothing can be put in the place of /dev/null, /dev/stdout or a named pipe.
    if path.exists() and not path.is_file():
        yield path
        return
    # In the same folder, for a rename across file systems is a copy; and with the suffix, by which
    # the writers choose the format. A name of 255 bytes has no room for a prefix.
    beside = path.with_name(f".{os.getpid()}-{path.name[-100:]}")
    try:
        yield beside
        beside.replace(path)
    finally:
        with suppress(OSError):
            beside.unlink()


def _check_target(path: Path, run: Path) -> None:
    if not path.name or path.is_dir():
        raise CommandError(f"-o must be a file, got the folder {str(path)!r}.")
    if not path.parent.is_dir():
        raise CommandError(f"-o is in a folder that does not exist: {str(path.parent)!r}. Make it.")
    whole, folder = path.resolve(), run.resolve()
    if whole == folder / NAME or any(folder / name in whole.parents for name in TABLES):
        raise CommandError(f"-o {str(path)!r} is a file of the run itself. Name another one.")


def tell_written(
    arguments: argparse.Namespace, out: Output, content: Mapping[str, Any], what: str
) -> None:
    """Says which file was written, and what is in it: as JSON if asked for, or in words."""
    if arguments.json:
        out.line(as_json({"run": run_name(arguments.run), **content}, indent=2))
    else:
        out.line(f"Wrote {printable(arguments.output)} ({what})")

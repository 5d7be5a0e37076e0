"""Shared by the commands: arguments, exit codes, errors, opening a run and writing a file."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradwatch.cli.terminal import Output, as_json
from gradwatch.pickles import stable_name
from gradwatch.record.wording import printable

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
"""Ctrl-C, except in ``tail``, whose normal end it is (exit code 0)."""
TERMINATED = 143

RUN = "folder of the run, as given to watch(run_dir=)"

Commands = Any
"""What ``ArgumentParser.add_subparsers()`` returns; the class is private in argparse."""


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace, Output], int],
    summary: str,
    description: str,
    examples: str,
) -> argparse.ArgumentParser:
    """Adds a command, and returns its parser.

    Args:
        commands: Where the command is added.
        name: What the user types after ``gradwatch``.
        run: Runs the command with the parsed arguments and the output; returns the exit code.
        summary: A few words for the list of commands.
        description: A few sentences for the help of the command.
        examples: Command lines to copy, one per line.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog="examples:\n" + "".join(f"  {line}\n" for line in examples.splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # A new option could make an abbreviation in somebody's script ambiguous.
        allow_abbrev=False,
    )
    parser.set_defaults(run_command=run)
    return parser


def at_least_one(text: str) -> int:
    """Parses an integer of at least 1, for ``add_argument(type=)``."""
    # int() alone would also accept "1_000", " 7 " and digits of other scripts.
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def open_run(path: str) -> History:
    """Opens a run folder.

    Raises:
        CommandError: If the folder does not exist or is not a run folder.
        OSError: If there is no permission to read it.
        ModuleNotFoundError: If pyarrow is not installed.
    """
    # Imported here: pandas and pyarrow take a second to load, and --help needs neither.
    from gradwatch.history import load
    from gradwatch.record.folder.files import UnreadableError

    if not path:
        raise CommandError("RUN is empty. Name the folder of a run, such as runs/a.")
    try:
        return load(path)
    except (UnreadableError, FileNotFoundError) as error:
        raise CommandError(str(error)) from error


def run_name(path: str) -> str:
    """Returns the name of a run for output: its path without a trailing slash."""
    return path.rstrip(os.sep) or path


@contextmanager
def written_whole(target: str, run: str) -> Iterator[Path]:
    """Yields a temporary path to write to, and renames it to the target after success.

    Args:
        target: The file that the user named; an existing one is replaced.
        run: Path of the run folder, whose own files are never overwritten.

    Yields:
        A path in the same folder, with the same suffix.

    Raises:
        CommandError: If the target is a folder, its folder does not exist, or it is a file of the
            run.
    """
    path = Path(target)
    _check_target(path, Path(run))
    # /dev/null, /dev/stdout and named pipes cannot be replaced: write to them directly.
    if path.exists() and not path.is_file():
        yield path
        return
    # In the same folder, because a rename across file systems would be a copy, and with the same
    # suffix, by which writers choose the format. A name of 255 bytes has no room for a prefix.
    beside = path.with_name(f".{os.getpid()}-{path.name[-100:]}")
    try:
        yield beside
        beside.replace(path)
    finally:
        with suppress(OSError):
            beside.unlink()


def _check_target(path: Path, run: Path) -> None:
    from gradwatch.record.folder.meta import NAME, TABLES  # NumPy comes with it

    if not path.name or path.is_dir():
        raise CommandError(f"-o must be a file, got the folder {str(path)!r}.")
    if not path.parent.is_dir():
        raise CommandError(
            f"-o is in a folder that does not exist: {str(path.parent)!r}. Create it first."
        )
    whole, folder = path.resolve(), run.resolve()
    if whole == folder / NAME or any(folder / name in whole.parents for name in TABLES):
        raise CommandError(f"-o {str(path)!r} is a file of the run itself. Name another file.")


def tell_written(
    arguments: argparse.Namespace, out: Output, content: Mapping[str, Any], what: str
) -> None:
    """Says which file was written and what is in it, in words or, with ``--json``, as JSON."""
    if arguments.json:
        out.line(as_json({"run": run_name(arguments.run), **content}, indent=2))
    else:
        out.line(f"Wrote {printable(arguments.output)} ({what})")

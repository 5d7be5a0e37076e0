"""What several commands share: arguments, exit codes, errors, and opening a run."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradwatch.record.folder.meta import NAME, TABLES

if TYPE_CHECKING:
    from gradwatch.history import History


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


Commands = Any
"""What ``ArgumentParser.add_subparsers()`` returns."""

RUN = "folder of the run, as given to watch(run_dir=)"


def add_command(
    commands: Commands, name: str, summary: str, description: str, examples: str
) -> argparse.ArgumentParser:
    """Adds a command.

    Args:
        commands: The commands of the parser.
        name: What the user types.
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
        allow_abbrev=False,
    )
    return parser


def add_run(parser: argparse.ArgumentParser) -> None:
    """Adds the run folder.

    Args:
        parser: Of a command.
    """
    parser.add_argument("run", metavar="RUN", help=RUN)


def add_json(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds ``--json``.

    Args:
        parser: Of a command.
        what: What it prints.
    """
    parser.add_argument("--json", action="store_true", help=f"print {what} as JSON")


def at_least_one(text: str) -> int:
    """Reads a number of things.

    Args:
        text: What the user typed.

    Raises:
        argparse.ArgumentTypeError: If it is no integer of at least 1.
    """
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def open_run(path: str) -> History:
    """Opens a run.

    Args:
        path: Its folder, as the user typed it.

    Raises:
        CommandError: If it is not there, or no run folder.
        OSError: If it may not be read.
        ModuleNotFoundError: If pyarrow is not installed.
    """
    from gradwatch.history import load
    from gradwatch.record.folder.files import UnreadableError

    if not path:
        raise CommandError("RUN is empty. Name the folder of a run, such as runs/a.")
    try:
        return load(path)
    except (UnreadableError, FileNotFoundError) as error:
        raise CommandError(str(error)) from error


def run_name(path: str) -> str:
    """Returns how the run is called in what is shown.

    Args:
        path: As the user typed it.
    """
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
    _check(path, Path(run))
    if path.exists() and not path.is_file():  # /dev/null, /dev/stdout, a named pipe
        yield path
        return
    beside = path.with_name(f".{os.getpid()}-{path.name[-100:]}")
    try:
        yield beside
        beside.replace(path)
    finally:
        with suppress(OSError):
            beside.unlink()


def _check(path: Path, run: Path) -> None:
    if not path.name or path.is_dir():
        raise CommandError(f"-o must be a file, got the folder {str(path)!r}.")
    if not path.parent.is_dir():
        raise CommandError(f"-o is in a folder that does not exist: {str(path.parent)!r}. Make it.")
    whole, folder = path.resolve(), run.resolve()
    if whole == folder / NAME or any(folder / name in whole.parents for name in TABLES):
        raise CommandError(f"-o {str(path)!r} is a file of the run itself. Name another one.")

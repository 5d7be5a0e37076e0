"""Shared by the commands: arguments, exit codes, errors, opening a run and writing a file."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradwatch.cli.terminal import Output, as_json, width
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

RUN = "folder of the run, as given to watch(run_dir=) or gradwatch run"
_NAME_ONE = "Name one of them, such as {example!r}."

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


# Imports are in the functions: pandas and pyarrow take a second to load, and --help needs neither.
# Even the names of the files come with NumPy and torch.


def run_folder(path: str) -> Path:
    """Returns the run folder that a path means: that of the only model of a process, or itself.

    Raises:
        CommandError: If there are several models, or the only one has no steps yet.
    """
    from gradwatch.record.folder.models import one_run

    with _problems_told(path):
        return one_run(path, _NAME_ONE)


def run_folders(path: str) -> dict[str, Path] | None:
    """Returns the run folders of all models of a process by name; None for any other folder.

    Raises:
        CommandError: If no model has steps yet.
    """
    from gradwatch.record.folder.models import models_in, runs_in

    with _problems_told(path):
        return None if models_in(path) is None else runs_in(path)


def open_run(path: str | Path) -> History:
    """Opens a run folder, or that of the only model of a process.

    Raises:
        CommandError: If the folder does not exist or is not a run folder, or there are several
            models.
        OSError: If there is no permission to read it.
        ModuleNotFoundError: If pyarrow is not installed.
    """
    from gradwatch.history import load

    folder = run_folder(str(path))
    with _problems_told(path):
        return load(folder)


@contextmanager
def _problems_told(path: str | Path) -> Iterator[None]:
    from gradwatch.record.folder.files import UnreadableError

    if not path:
        raise CommandError("RUN is empty. Name the folder of a run, such as runs/a.")
    try:
        yield
    except (UnreadableError, FileNotFoundError) as error:
        raise CommandError(str(error)) from error


def run_name(path: str) -> str:
    """Returns the name of a run for output: its path without a trailing slash."""
    return path.rstrip(os.sep) or path


def heading(model: str) -> str:
    """Returns the name of a model, underlined, to stand above what is printed about it."""
    name = printable(model)
    return f"{name}\n{'=' * width(name)}"


def in_models(
    path: str, models: Iterable[str], parts: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """Returns the JSON of a folder of models, of what there is to say about each."""
    contents = [{"model": model, **part} for model, part in zip(models, parts, strict=True)]
    return {"run": run_name(path), "models": contents}


@contextmanager
def written_whole(target: str, run: Path) -> Iterator[Path]:
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
    _check_target(path, run)
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

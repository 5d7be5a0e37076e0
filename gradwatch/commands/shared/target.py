"""Files that a command writes: whole or not at all, and never over the run itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gradwatch.commands.shared.command_error import CommandError
from gradwatch.record.folder.meta import NAME, TABLES


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

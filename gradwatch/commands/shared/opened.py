"""Opening the run that a command is given."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from gradwatch.commands.shared.command_error import CommandError

if TYPE_CHECKING:
    from gradwatch.history import History


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
    from gradwatch.record.folder.unreadable import UnreadableError

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

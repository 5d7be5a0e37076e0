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
        CommandError: If it cannot be read.
        ModuleNotFoundError: If pyarrow is not installed.
    """
    from gradwatch.history import load

    if not path:
        raise CommandError("RUN is empty. Name the folder of a run, such as runs/a.")
    try:
        return load(path)
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from error


def run_name(path: str) -> str:
    """Returns how the run is called in what is shown.

    Args:
        path: As the user typed it.
    """
    return path.rstrip(os.sep) or path

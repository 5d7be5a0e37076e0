"""Waiting for a run to begin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gradwatch.commands.live.follower import Follower
from gradwatch.commands.shared.command_error import CommandError
from gradwatch.commands.shared.opened import open_run
from gradwatch.record.folder.meta import NAME

ADD_WAIT = " Add --wait to wait for it to begin."


def begun(run: str, wait: bool, once: bool, pause: Callable[[], object]) -> Follower:
    """Opens a run for following; one whose folder is there and empty begins within seconds.

    Args:
        run: The run folder.
        wait: Whether to wait for one that is not there.
        once: Whether to wait for none.
        pause: Waits a little, and says so.

    Raises:
        CommandError: If it is not there, or no run.
    """
    while not once and _may_begin(Path(run), wait):
        pause()
    try:
        open_run(run)
    except CommandError as problem:
        may_come = bool(run) and not once and not Path(run).exists()
        raise CommandError(f"{problem}{ADD_WAIT if may_come else ''}") from problem
    return Follower(Path(run))


def _may_begin(folder: Path, wait: bool) -> bool:
    """Tells of a folder that is not there, empty, or being made at this moment."""
    if not folder.exists():
        return wait
    if not folder.is_dir() or (folder / NAME).exists():
        return False
    return all(path.name.startswith(".") for path in folder.iterdir())

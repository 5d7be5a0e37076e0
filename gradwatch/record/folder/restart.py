"""A run that begins anew in the folder of another one: the earlier run is kept beside it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from gradwatch.record.folder.meta import NAME, TABLES
from gradwatch.record.step import StepRecord

EARLIER = "earlier-{number}"


def begins_anew(steps: Sequence[StepRecord]) -> bool:
    """Tells whether the first steps that a session writes are the first of a run.

    Args:
        steps: The steps; a resumed run goes on after the last one of its checkpoint.
    """
    first = {record.optimizer: record.step for record in reversed(steps)}
    return bool(first) and all(step == 1 for step in first.values())


def set_aside(folder: Path) -> Path | None:
    """Moves the run that a folder holds into a folder inside of it, which is a run folder too.

    Whatever stops it in between, no step is lost: what has been moved is no longer read here.

    Args:
        folder: A run folder, or one that is to become one.

    Returns:
        Where the run is now; None where there was none with steps in it.

    Raises:
        OSError: If the disk is full or read-only.
    """
    steps = folder / TABLES[0]
    if not steps.is_dir() or next(steps.glob("*.parquet"), None) is None:
        return None  # a temporary file, left over by a process that was killed, is no step
    number = 1
    while (target := folder / EARLIER.format(number=number)).exists():
        number += 1
    target.mkdir()
    shutil.copy2(folder / NAME, target / NAME)
    for table in TABLES:
        if (folder / table).exists():
            (folder / table).rename(target / table)
    return target

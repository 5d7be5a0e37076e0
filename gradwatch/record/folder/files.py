"""Files that appear whole or not at all, and the error for those that cannot be read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


class UnreadableError(ValueError):
    """No run folder, half of one, one in a newer format, or a file in it that is damaged."""


SUFFIX = ".tmp"


def write_whole(target: Path, content: Any, *, sync_name: bool = True) -> None:
    """Writes a file under another name, and renames it when it is on the disk.

    Args:
        target: The file; one that is there is replaced.
        content: Bytes, or what has the buffer of bytes.
        sync_name: Whether the new name is on the disk too when this returns.

    Raises:
        OSError: If the disk is full, read-only or gone; then nothing has changed.
    """
    # The leading dot keeps it out of the folder listings of pandas, DuckDB and Polars.
    temporary = target.with_name(f".{target.name}{SUFFIX}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        _remove(temporary)
        raise
    if sync_name:
        sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a power failure, where the system can do that.

    Args:
        folder: The folder.
    """
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Removes what a killed process was about to rename.

    Args:
        folder: The folder.
    """
    for path in folder.glob(f".*{SUFFIX}"):
        _remove(path)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return  # a leftover harms nobody; what led here is the error to tell

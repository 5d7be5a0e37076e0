"""Files that appear whole or not at all, what JSON can say, and the error for unreadable files."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from gradwatch.pickles import stable_name


@stable_name
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
            # Before the rename: after a power failure a file system may know the new name of a
            # file whose bytes it never wrote.
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        remove_quietly(temporary)
        raise
    if sync_name:
        sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a power failure, where the system can do that."""
    if os.name == "nt":  # where a folder cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Removes what a killed process was about to rename."""
    for path in folder.glob(f".*{SUFFIX}"):
        remove_quietly(path)


def remove_quietly(path: Path) -> None:
    """Removes a file as far as the disk allows; whoever needs it gone must not rely on this."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


def plain_data(value: Any, nonfinite: Callable[[float], Any] = str) -> Any:
    """Turns a value into what strict JSON can say; what it has no form for becomes its text.

    Args:
        value: Anything; mappings, sequences, sets and arrays are converted throughout.
        nonfinite: Stands for NaN and infinities: JSON has no numbers for them.
    """
    if isinstance(value, Mapping):
        return {str(key): plain_data(one, nonfinite) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain_data(one, nonfinite) for one in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain_data(value.tolist(), nonfinite)
    if isinstance(value, float):
        return value if math.isfinite(value) else nonfinite(value)
    return value if value is None or isinstance(value, bool | int | str) else str(value)

"""Writing files atomically, plain data for JSON, and the error for folders that cannot be read."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gradwatch.pickles import stable_name


@stable_name
class UnreadableError(ValueError):
    """A folder is not a run folder, is incomplete or in a newer format, or a file is damaged."""


SUFFIX = ".tmp"


def write_whole(target: Path, content: Any, *, sync_name: bool = True) -> None:
    """Writes a file atomically: under a temporary name, renamed once the bytes are on disk.

    Args:
        target: An existing file is replaced.
        content: Bytes, or an object with the buffer protocol.
        sync_name: Whether the new name must be on disk too when this returns.

    Raises:
        OSError: If the disk is full, read-only or gone; then nothing has changed.
    """
    # pandas, DuckDB and Polars skip names with a leading dot when they read a folder.
    temporary = target.with_name(f".{target.name}{SUFFIX}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            # Before the rename: otherwise, after a power failure, a file system may know the new
            # name of a file whose bytes it never wrote.
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        remove_quietly(temporary)
        raise
    if sync_name:
        sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Syncs a folder, so that the names in it survive a power failure; a no-op on Windows."""
    if os.name == "nt":  # a folder cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Removes temporary files that a killed process never renamed."""
    for path in folder.glob(f".*{SUFFIX}"):
        remove_quietly(path)


def remove_quietly(path: Path) -> None:
    """Removes a file if the disk allows it; the file may still be there afterwards."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


def plain_data(value: Any, nonfinite: Callable[[float], Any] = str) -> Any:
    """Converts a value to what strict JSON can hold; other objects become ``str(value)``.

    Args:
        value: Anything; mappings, sequences, sets and arrays are converted recursively.
        nonfinite: Makes the replacement for NaN and infinities, which JSON does not have.
    """
    if isinstance(value, Mapping):
        return {str(key): plain_data(one, nonfinite) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain_data(one, nonfinite) for one in value]
    import numpy as np  # here, so that the command line starts without it

    if isinstance(value, np.ndarray | np.generic):
        return plain_data(value.tolist(), nonfinite)
    if isinstance(value, float):
        return value if math.isfinite(value) else nonfinite(value)
    return value if value is None or isinstance(value, bool | int | str) else str(value)

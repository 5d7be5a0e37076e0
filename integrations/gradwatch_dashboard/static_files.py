"""Static files: the front end, read once, so that no request names a path."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ENTRY = "index.js"
"""The module that TensorBoard opens."""

_TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_NAME = re.compile(r"[A-Za-z0-9_.-]+")


class StaticFile(NamedTuple):
    """A file of the front end.

    Attributes:
        content: All of it.
        content_type: Its media type.
    """

    content: bytes
    content_type: str


def read_static_files(folder: Path) -> dict[str, StaticFile]:
    """Reads the front end.

    Args:
        folder: Where it lies.

    Returns:
        Name to file, of all scripts, styles and pictures that lie right there.

    Raises:
        FileNotFoundError: If there is no entry among them.
    """
    files = {
        path.name: StaticFile(path.read_bytes(), _TYPES[path.suffix])
        for path in sorted(folder.glob("*"))
        if path.suffix in _TYPES and _NAME.fullmatch(path.name) and path.is_file()
    }
    if ENTRY not in files:
        raise FileNotFoundError(f"its front end is missing, no {ENTRY} in {folder}")
    return files

"""LineFile: a file that holds whole lines, whatever happens while they are written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path

CHUNK = 1 << 16
"""Bytes that are read at once, from the end backwards."""


class LineFile:
    """Appends lines to a file, some at a time: all of them, or none.

    Each time they are one write to the operating system, with no buffer between: readers see them
    at once, and a process that is killed leaves them behind. A half line, as after a loss of power,
    is cut off when the file is opened.

    Every method raises ``OSError`` if the disk is full, read-only or gone.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file, which is made with its folder if it is not there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = FileIO(path, "a+")
        self._torn: int | None = None  # where lines begin that may be there by half
        for position, line in self.backwards():
            if not line.endswith(b"\n"):
                self.cut(position)
            break

    def append(self, lines: bytes) -> None:
        """Appends lines, each of which ends with a newline."""
        if self._torn is not None:
            self.cut(self._torn)
        start = self._torn = self._file.seek(0, os.SEEK_END)
        try:
            rest = memoryview(lines)
            while rest:
                rest = rest[self._file.write(rest) :]
        except BaseException:
            with suppress(OSError):  # or before the next lines
                self.cut(start)
            raise
        self._torn = None

    def backwards(self) -> Iterator[tuple[int, bytes]]:
        """Yields where each line begins, and the line, from the last one to the first."""
        start, rest = self._file.seek(0, os.SEEK_END), b""
        while start:
            position = start + len(rest)
            size = min(CHUNK, start)
            start = self._file.seek(start - size)
            lines = (self._file.read(size) + rest).splitlines(keepends=True)
            # The first one may begin further up.
            rest = lines.pop(0) if start else b""
            for line in reversed(lines):
                position -= len(line)
                yield position, line

    def cut(self, size: int) -> None:
        """Cuts the file down to a number of bytes."""
        self._file.truncate(size)
        self._torn = None

    def close(self) -> None:
        """Releases the file."""
        self._file.close()

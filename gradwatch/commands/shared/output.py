"""Output: standard output that may be closed, a pipe that has enough, or a narrow encoding."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TextIO


class Output:
    """Writes lines; what is written after the reader has gone is dropped without a word.

    So ``gradwatch ... | head`` is silent, and the exit code stays what the command found.

    Attributes:
        closed: Whether nobody reads any more.
    """

    def __init__(self, stream: TextIO | None) -> None:
        """Takes a stream; what its encoding has no bytes for is written as an escape.

        Args:
            stream: Where to write; None where it was closed from the beginning.
        """
        self.closed = stream is None
        self._stream = stream
        with suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]

    @property
    def stream(self) -> TextIO:
        """The stream itself."""
        return self._stream if self._stream is not None else sys.stderr

    @property
    def is_terminal(self) -> bool:
        """Whether a person reads it, on a terminal that can move its cursor."""
        return not self.closed and self.stream.isatty() and os.environ.get("TERM") != "dumb"

    def can_show(self, text: str) -> bool:
        """Tells whether the encoding has bytes for a text.

        Args:
            text: Any string.
        """
        try:
            text.encode(getattr(self._stream, "encoding", None) or "ascii")
        except (UnicodeError, LookupError):
            return False
        return True

    def line(self, text: str = "") -> None:
        """Writes a line.

        Args:
            text: Without its line break.
        """
        self.write(text + "\n")

    def write(self, text: str) -> None:
        """Writes text as it is.

        Args:
            text: Any string.
        """
        if not self.closed:
            try:
                self.stream.write(text)
            except BrokenPipeError:
                self.close()

    def flush(self) -> None:
        """Sends what has been written."""
        if not self.closed:
            try:
                self.stream.flush()
            except BrokenPipeError:
                self.close()

    def close(self) -> None:
        """Writes nothing more, and keeps Python from complaining about the pipe as it exits."""
        self.closed = True
        with suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

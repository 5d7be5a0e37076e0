"""Text for terminals, pipes and files: numbers, tables, curves and JSON, all printable."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any, TextIO
from unicodedata import combining, east_asian_width

from gradwatch.record.folder.files import plain_data
from gradwatch.record.wording import printable


def number(value: float) -> str:
    """Formats a measured number with four digits.

    Example:
        >>> number(0.123456), number(1234567.0), number(float("nan"))
        ('0.1235', '1.235e+06', 'nan')
    """
    return f"{value:.4g}"


def or_dash(value: float) -> str:
    """Formats a number with four digits; a dash for NaN."""
    return "-" if math.isnan(value) else number(value)


def times(ratio: float) -> str:
    """Formats a ratio with a leading "x".

    Example:
        >>> times(0.5), times(1234.0)
        ('x0.5', 'x1234')
    """
    return f"x{ratio:.4g}"


def percent(share: float) -> str:
    """Formats a share from 0 to 1 as a percentage; a dash for NaN."""
    return "-" if math.isnan(share) else f"{100 * share:.3g} %"


_ELLIPSIS = "..."


def printable_lines(text: str) -> str:
    """Escapes like :func:`~gradwatch.record.wording.printable`, but keeps line breaks."""
    return "\n".join(map(printable, text.split("\n")))


def one_line(text: str) -> str:
    """Joins text into one line, each run of whitespace as one space, and escapes the rest."""
    return printable(" ".join(text.split()))


def width(text: str) -> int:
    """Returns how many terminal columns a printable text takes."""
    if text.isascii():
        return len(text)
    # Combining accents take no column, wide East Asian characters take two.
    return sum(0 if combining(one) else 1 + (east_asian_width(one) in "WF") for one in text)


def shortened(text: str, columns: int) -> str:
    """Cuts the middle out of a printable text that is wider than ``columns``, which is at least 8.

    The middle, because the beginning and the end of a parameter's name say most.
    """
    if width(text) <= columns:
        return text
    room = columns - len(_ELLIPSIS)
    head, tail = _prefix(text, room // 3), _prefix(text[::-1], room - room // 3)[::-1]
    return head + _ELLIPSIS + tail


def _prefix(text: str, columns: int) -> str:
    used = 0
    for index, one in enumerate(text):
        used += width(one)
        if used > columns:
            return text[:index]
    return text


def event_line(step: int, kind: str, message: str, optimizer: str = "") -> str:
    """Formats an event; pass ``optimizer`` if the run has several."""
    label = f"{printable(optimizer)} " if optimizer else ""
    return f"{label}step {step:,}  {printable(kind)}: {printable(message)}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Formats a table: the first column left-aligned, the others right-aligned.

    Returns:
        One line per row, the header first.
    """
    lines = [header, *rows]
    widths = [max(map(width, column)) for column in zip(*lines, strict=True)]
    return [_line(row, widths) for row in lines]


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    padding = [" " * (wide - width(cell)) for cell, wide in zip(row, widths, strict=True)]
    cells = [row[0] + padding[0]]
    cells += [gap + cell for cell, gap in zip(row[1:], padding[1:], strict=True)]
    return "  ".join(cells).rstrip()


BLOCKS = "▁▂▃▄▅▆▇█"
ASCII = "_.,-~=+#"
_BAD = "!"
"""Shown for a number that is NaN or infinite."""


def sparkline(values: Sequence[float], columns: int, levels: str = BLOCKS) -> str:
    """Draws positive numbers on a logarithmic scale; each column shows its largest number.

    Args:
        values: Oldest first.
        columns: Maximum width of the curve.
        levels: Characters from low to high.

    Returns:
        At most ``columns`` characters: ``!`` if a number is not finite, a space if all are 0.

    Example:
        >>> sparkline([1.0, 10.0, 100.0, float("nan")], 10)
        '▁▅█!'
    """
    cells = [_largest(cell) for cell in _split(values, columns)]
    # A logarithmic scale, because gradient norms span several powers of ten.
    logs = [math.log(value) for value in cells if 0 < value < math.inf]
    if not logs:
        return "".join(_BAD if not math.isfinite(value) else " " for value in cells)
    low, high = min(logs), max(logs)
    return "".join(_drawn(value, low, high, levels) for value in cells)


def _split(values: Sequence[float], columns: int) -> list[Sequence[float]]:
    count = min(columns, len(values))
    bounds = [len(values) * index // count for index in range(count + 1)] if count else [0]
    return [values[start:stop] for start, stop in pairwise(bounds)]


def _largest(values: Sequence[float]) -> float:
    # Count NaN as the largest: what plain max() does with it depends on the order.
    return max(values, key=lambda value: value if math.isfinite(value) else math.inf)


def _drawn(value: float, low: float, high: float, levels: str) -> str:
    if not math.isfinite(value):
        return _BAD
    if value <= 0:
        return " "
    share = (math.log(value) - low) / (high - low) if high > low else 0.0
    return levels[min(len(levels) - 1, round(share * (len(levels) - 1)))]


def as_json(value: Any, indent: int | None = None) -> str:
    """Formats a value as strict JSON in ASCII.

    Args:
        value: Mappings, sequences, strings and numbers, also those of NumPy; other objects become
            ``str(value)``.
        indent: As for :func:`json.dumps`.

    Returns:
        The text; NaN is ``null``, and infinities are ``"Infinity"`` and ``"-Infinity"``.

    Example:
        >>> as_json({"norm": float("inf"), "loss": float("nan")})
        '{"norm": "Infinity", "loss": null}'
    """
    return json.dumps(plain_data(value, _nonfinite), allow_nan=False, indent=indent)


def _nonfinite(value: float) -> str | None:
    if math.isnan(value):
        return None
    return "Infinity" if value > 0 else "-Infinity"


class Output:
    """Writes lines; after the reader of a pipe is gone, output is dropped silently.

    So ``gradwatch ... | head`` prints no error, and the exit code is that of the command.

    Attributes:
        closed: Whether the reader is gone, or the stream was closed from the beginning.
    """

    def __init__(self, stream: TextIO | None) -> None:
        """Writes to a stream; None if it was closed before Python started."""
        self.closed = stream is None
        self._stream = stream
        # Escape characters of names that the encoding lacks, instead of a UnicodeEncodeError.
        with suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]

    @property
    def stream(self) -> TextIO:
        """The underlying stream."""
        return self._stream if self._stream is not None else sys.stderr

    @property
    def is_terminal(self) -> bool:
        """Whether the output goes to a terminal that can move its cursor."""
        return not self.closed and self.stream.isatty() and os.environ.get("TERM") != "dumb"

    def can_show(self, text: str) -> bool:
        """Tells whether the stream's encoding can represent a text."""
        try:
            text.encode(getattr(self._stream, "encoding", None) or "ascii")
        except (UnicodeError, LookupError):
            return False
        return True

    def line(self, text: str = "") -> None:
        """Writes a text and a line break."""
        self.write(text + "\n")

    def write(self, text: str) -> None:
        """Writes a text without adding a line break."""
        if not self.closed:
            try:
                self.stream.write(text)
            except BrokenPipeError:
                self.close()

    def flush(self) -> None:
        """Flushes the stream."""
        if not self.closed:
            try:
                self.stream.flush()
            except BrokenPipeError:
                self.close()

    def close(self) -> None:
        """Stops writing, and keeps Python from reporting the broken pipe when it exits."""
        self.closed = True
        # At exit Python flushes its streams; on a broken pipe it prints an error and exits with
        # 120. Redirect the descriptor to /dev/null instead.
        with suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

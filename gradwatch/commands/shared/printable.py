"""Text that is safe to show in a terminal, whatever a stranger's run has in its names."""

from __future__ import annotations

from unicodedata import combining, east_asian_width

ELLIPSIS = "..."


def printable(text: str) -> str:
    r"""Escapes what would move the cursor, colour, reorder or break the line.

    Args:
        text: Any string.

    Returns:
        The text on one line; an escape character is shown as ``\x1b``, a line break as ``\n``.

    Example:
        >>> printable("a\x1b[31mb\nc")
        'a\\x1b[31mb\\nc'
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else _escaped(one) for one in text)


def printable_lines(text: str) -> str:
    """Escapes like :func:`printable`, and keeps the line breaks.

    Args:
        text: Text of several lines.
    """
    return "\n".join(map(printable, text.split("\n")))


def one_line(text: str) -> str:
    """Puts text on one line, runs of spaces and breaks as one space, and escapes the rest.

    Args:
        text: Any string.
    """
    return printable(" ".join(text.split()))


def width(text: str) -> int:
    """Returns how many columns of a terminal a text takes.

    Args:
        text: Printable text.
    """
    if text.isascii():
        return len(text)
    return sum(0 if combining(one) else 1 + (east_asian_width(one) in "WF") for one in text)


def shortened(text: str, columns: int) -> str:
    """Cuts the middle out of a text that is too wide: the ends of a parameter's name say most.

    Args:
        text: Printable text.
        columns: How wide it may be, at least 8.
    """
    if width(text) <= columns:
        return text
    room = columns - len(ELLIPSIS)
    head, tail = _prefix(text, room // 3), _prefix(text[::-1], room - room // 3)[::-1]
    return head + ELLIPSIS + tail


def _prefix(text: str, columns: int) -> str:
    used = 0
    for place, one in enumerate(text):
        used += width(one)
        if used > columns:
            return text[:place]
    return text


def _escaped(one: str) -> str:
    return one.encode("unicode_escape").decode("ascii")

"""Counts, lists and names in sentences that a terminal shows as they are."""

from __future__ import annotations

from collections.abc import Sequence


def counted(amount: int, one: str, many: str = "") -> str:
    """Writes a number of things.

    Args:
        amount: How many.
        one: The word for one of them.
        many: The word for several; ``one`` with an s if left out.

    Example:
        >>> counted(1, "step"), counted(12000, "step")
        ('1 step', '12,000 steps')
    """
    return f"{amount:,} {one if amount == 1 else many or one + 's'}"


def named(names: Sequence[str], most: int = 3) -> str:
    """Lists at most so many names, and says how many more there are.

    Example:
        >>> named(["a", "b", "c", "d", "e"])
        'a, b, c and 2 more'
    """
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"


def printable(text: str) -> str:
    r"""Escapes what would move the cursor, colour, reorder or break the line.

    Returns:
        The text on one line; an escape character is shown as ``\x1b``, a line break as ``\n``.

    Example:
        >>> printable("a\x1b[31mb\nc")
        'a\\x1b[31mb\\nc'
    """
    if text.isprintable():
        return text
    # Not the whole text: "é" is printable, and unicode_escape would write it as \xe9.
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

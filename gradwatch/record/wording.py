"""Small parts of sentences: counts with their nouns, lists, numbers, text that is safe to print."""

from __future__ import annotations

import re
from collections.abc import Sequence
from textwrap import fill

WIDTH = 100
_CODE_SPACE = "\N{NO-BREAK SPACE}"
_WITH_NEXT = re.compile(r"\b(examples?|steps?|micro-batch|optimizer|norm|argument|line) (?=\S)")


def counted(amount: int, one: str, many: str = "") -> str:
    """Formats a count with its noun.

    Args:
        amount: How many there are.
        one: The singular.
        many: The plural; by default, the singular with an "s".

    Example:
        >>> counted(1, "step"), counted(12000, "step")
        ('1 step', '12,000 steps')
    """
    return f"{amount:,} {one if amount == 1 else many or one + 's'}"


def printable(text: str) -> str:
    r"""Escapes characters that would move the cursor, or color, reorder or break the line.

    Returns:
        The text on one line; an escape character is shown as ``\x1b``, a line break as ``\n``.

    Example:
        >>> printable("a\x1b[31mb\nc")
        'a\\x1b[31mb\\nc'
    """
    if text.isprintable():
        return text
    # Character by character: unicode_escape would also turn "é", which is printable, into \xe9.
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def listed(items: Sequence[str], most: int = 3) -> str:
    """Joins at most ``most`` items as a sentence does, and says how many more there are.

    Example:
        >>> listed(["3"]), listed(["3", "17"]), listed(["a", "b", "c", "d", "e"])
        ('3', '3 and 17', 'a, b, c and 2 more')
    """
    shown = list(items[:most])
    if len(items) > most:
        shown.append(f"{len(items) - most:,} more")
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def number(value: float) -> str:
    """Formats a number with four digits; with more for whole ones, and next to 1 and -1.

    Example:
        >>> number(0.123456), number(-0.0), number(1.0000001), number(65504.0)
        ('0.1235', '0', '1.0000001', '65504')
    """
    value = float(value) + 0.0  # makes -0.0 a 0.0
    if value.is_integer() and abs(value) < 1e6:
        return f"{value:.0f}"
    short = f"{value:.4g}"
    return f"{value:.8g}" if short in ("1", "-1") else short


def wrapped(text: str, indent: str = "") -> str:
    """Wraps a paragraph to :data:`WIDTH` columns; lines after the first begin with ``indent``.

    What is between backticks is code, and stays on one line where it fits; a number stays with its
    noun.
    """
    pieces = text.split("`")
    pieces[1::2] = [piece.replace(" ", _CODE_SPACE) for piece in pieces[1::2]]
    text = _WITH_NEXT.sub(rf"\1{_CODE_SPACE}", "`".join(pieces))
    # Whitespace is ours: fill() would also break at the no-break spaces if it replaced it.
    lines = fill(
        text,
        WIDTH,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )
    return lines.replace(_CODE_SPACE, " ")

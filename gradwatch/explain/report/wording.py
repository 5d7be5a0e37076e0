"""Wording: numbers, steps and names as the sentences of a report have them."""

from __future__ import annotations

from collections.abc import Sequence

from gradwatch.explain.report.finding import MOST_STEPS
from gradwatch.explain.report.track import Array


def named(names: Sequence[str], most: int = 3) -> str:
    """Lists names, and says how many more there are.

    Args:
        names: The names.
        most: How many to write out.

    Example:
        >>> named(["a", "b", "c", "d", "e"])
        'a, b, c and 2 more'
    """
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"


def counted(count: int, noun: str) -> str:
    """Writes a number of things.

    Args:
        count: How many.
        noun: One of them.

    Example:
        >>> counted(1, "step"), counted(2_000, "step")
        ('1 step', '2,000 steps')
    """
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def first_steps(steps: Array) -> tuple[int, ...]:
    """Takes as many steps as a finding names.

    Args:
        steps: int array.
    """
    return tuple(int(step) for step in steps[:MOST_STEPS])


def printable(text: str) -> str:
    r"""Replaces what a terminal would obey, such as escape sequences in a name, by its code.

    Args:
        text: Any text.

    Example:
        >>> printable("a\x1b[2J")
        'a\\x1b[2J'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

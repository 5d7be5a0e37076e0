"""Finding: one thing that a report has found, with its evidence, and the words for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from gradwatch.pickles import stable_name

Severity = Literal["critical", "warning", "note"]
SEVERITIES: tuple[str, ...] = get_args(Severity)
"""From the heaviest to the lightest."""

MOST_STEPS = 10


@stable_name
@dataclass(frozen=True, slots=True)
class Evidence:
    """The evidence of a finding.

    Attributes:
        steps: Steps at which it shows, at most :data:`MOST_STEPS`; the first one comes first.
        parameters: Parameters that it is about, in the order in which they matter.
        numbers: What was measured, and the threshold that it was held against.
        optimizer: Label of the optimizer whose steps these are; empty where it is about all.
    """

    steps: tuple[int, ...] = ()
    parameters: tuple[str, ...] = ()
    numbers: Mapping[str, float] = field(default_factory=dict)
    optimizer: str = ""


@stable_name
@dataclass(frozen=True, slots=True)
class Finding:
    """Something in a run that deserves a person's attention.

    Attributes:
        kind: A short name that scripts can use, one of :data:`~gradwatch.report.KINDS`.
        severity: ``"critical"`` (the run is lost, or will be), ``"warning"`` (it learns less than
            it could) or ``"note"`` (worth knowing).
        title: What is the matter, in one sentence with numbers.
        seen: The evidence.
        why: Why it matters.
        advice: What to try.
    """

    kind: str
    severity: Severity
    title: str
    seen: Evidence
    why: str
    advice: str


def first_steps(steps: Iterable[int]) -> tuple[int, ...]:
    """Returns as many steps as evidence names."""
    # int(): a NumPy integer is no JSON.
    return tuple(map(int, steps))[:MOST_STEPS]


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

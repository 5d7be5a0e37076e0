"""A finding of a report with its evidence, and helpers to put findings into words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from gradwatch.pickles import stable_name
from gradwatch.record.explanation import Explanation
from gradwatch.record.schema import loads_older

Severity = Literal["critical", "warning", "note"]
SEVERITIES: tuple[str, ...] = get_args(Severity)
"""From most to least serious."""

MOST_STEPS = 10


@stable_name
@dataclass(frozen=True, slots=True)
class Evidence:
    """The evidence of a finding.

    Attributes:
        steps: Steps at which it shows, at most :data:`MOST_STEPS`.
        parameters: Names of the parameters concerned, most important first.
        numbers: What was measured, and the threshold that it was compared with.
        optimizer: Label of the optimizer whose steps these are; empty if it concerns all.
    """

    steps: tuple[int, ...] = ()
    parameters: tuple[str, ...] = ()
    numbers: Mapping[str, float] = field(default_factory=dict)
    optimizer: str = ""


@stable_name
@loads_older
@dataclass(frozen=True, slots=True)
class Finding:
    """Something in a run that deserves attention.

    Attributes:
        kind: A short name for scripts, one of :data:`~gradwatch.report.KINDS`.
        severity: ``"critical"`` (the run is lost, or will be), ``"warning"`` (it learns less than
            it could) or ``"note"`` (worth knowing).
        title: The problem in one sentence, with numbers.
        seen: The evidence: steps, parameters and measured numbers.
        why: Why it matters.
        advice: What to try.
        explanation: Where it came from, to the line of code, if a step of it was explained.
    """

    kind: str
    severity: Severity
    title: str
    seen: Evidence
    why: str
    advice: str
    explanation: Explanation | None = None


def first_steps(steps: Iterable[int]) -> tuple[int, ...]:
    """Returns the first :data:`MOST_STEPS` steps."""
    # int(): json.dumps does not take NumPy integers.
    return tuple(map(int, steps))[:MOST_STEPS]


def named(names: Sequence[str], most: int = 3) -> str:
    """Lists at most ``most`` names, and says how many more there are.

    Example:
        >>> named(["a", "b", "c", "d", "e"])
        'a, b, c and 2 more'
    """
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"

"""Steps and events as text, for lines and for the screen."""

from __future__ import annotations

import math
from collections.abc import Iterable

from gradwatch.commands.live.row import Happening, Row
from gradwatch.commands.shared.numbers import number, percent, times
from gradwatch.commands.shared.printable import printable, shortened

NAME = 60


def step_line(row: Row, several: bool) -> str:
    """Writes a step.

    Args:
        row: The step.
        several: Whether the run has several optimizers.
    """
    label = f"{printable(row.optimizer)} " if several else ""
    parts = [f"{label}step {row.step:>8,}", f"norm {number(row.grad_norm):>9}"]
    parts += [f"{name} {number(value):>9}" for name, value in _known(row)]
    parts += [text for text in (clip_text(row), _outcome(row)) if text]
    return "  ".join(parts)


def event_line(event: Happening, several: bool = False) -> str:
    """Writes an event.

    Args:
        event: The event.
        several: Whether the run has several optimizers.
    """
    label = f"{printable(event.optimizer)} " if several else ""
    return f"{label}step {event.step:,}  {printable(event.kind)}: {printable(event.message)}"


def clip_text(row: Row) -> str:
    """Says what the clip did in a step; nothing where it did nothing.

    Args:
        row: The step.
    """
    return f"clipped {times(row.clip_coef)}" if row.clipped else ""


def clip_rate(rows: Iterable[Row]) -> str:
    """Says which share of the applied steps was clipped.

    Args:
        rows: The steps.
    """
    clipped = [row.clipped for row in rows if row.outcome == "applied"]
    return percent(sum(clipped) / len(clipped) if clipped else math.nan)


def where(event: Happening) -> str:
    """Names the parameter of an event.

    Args:
        event: The event.
    """
    return shortened(printable(event.parameter), NAME)


def ago(seconds: float) -> str:
    """Writes how long ago something was.

    Args:
        seconds: The time.

    Example:
        >>> ago(3.2), ago(150), ago(7200)
        ('3 s', '2 min', '2 h')
    """
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s"


def _known(row: Row) -> list[tuple[str, float]]:
    pairs = [("loss", row.loss), ("lr", row.lr)]
    return [(name, value) for name, value in pairs if not math.isnan(value)]


def _outcome(row: Row) -> str:
    return "" if row.outcome == "applied" else printable(row.outcome).replace("_", " ")

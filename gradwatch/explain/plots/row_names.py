"""The names of rows beside a plot, as many as can be read."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from gradwatch.explain.plots.canvas import PLAIN

LONGEST = 44
LARGEST_POINTS, SMALLEST_POINTS = 8.0, 5.5
POINTS_PER_INCH = 72


def name_rows(ax: Axes, labels: Sequence[str]) -> None:
    """Labels the rows, the first one above; where they are too thin every second one, and so on.

    Args:
        ax: The axes.
        labels: One per row.
    """
    inches = ax.get_window_extent().height / ax.figure.dpi
    points = POINTS_PER_INCH * inches / max(1, len(labels))
    each = max(1, -int(-SMALLEST_POINTS * 1.15 // points))
    size = min(LARGEST_POINTS, max(SMALLEST_POINTS, points * each / 1.2))
    rows = range(0, len(labels), each)
    ax.set_yticks(rows, [short(labels[row]) for row in rows], fontsize=size, **PLAIN)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(labels) - 0.5, -0.5)


def short(name: str) -> str:
    r"""Shortens a name in its middle; letters that a font may lack are written as ``\xe9``.

    Args:
        name: Any string.
    """
    text = name.replace("\N{HORIZONTAL ELLIPSIS}", "...")
    text = text.encode("ascii", "backslashreplace").decode()
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST // 3]}...{text[-(LONGEST - LONGEST // 3 - 3) :]}"

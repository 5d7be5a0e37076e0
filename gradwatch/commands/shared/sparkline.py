"""A curve in one line of text, on a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII = "_.,-~=+#"
BAD = "!"
"""Stands where a number is NaN or infinite."""


def sparkline(values: Sequence[float], columns: int, levels: str = BLOCKS) -> str:
    """Draws positive numbers; where several share a column, the largest counts.

    Args:
        values: The numbers, oldest first.
        columns: How wide the curve may be.
        levels: Characters from low to high.

    Returns:
        At most so many characters: ``!`` where a number is not finite, a space where all are 0.

    Example:
        >>> sparkline([1.0, 10.0, 100.0, float("nan")], 10)
        '▁▅█!'
    """
    cells = [_cell(cell) for cell in _split(values, columns)]
    logs = [math.log(value) for value in cells if 0 < value < math.inf]
    if not logs:
        return "".join(BAD if not math.isfinite(value) else " " for value in cells)
    low, high = min(logs), max(logs)
    return "".join(_drawn(value, low, high, levels) for value in cells)


def _split(values: Sequence[float], columns: int) -> list[Sequence[float]]:
    count = min(columns, len(values))
    bounds = [len(values) * place // count for place in range(count + 1)] if count else [0]
    return [values[start:stop] for start, stop in pairwise(bounds)]


def _cell(values: Sequence[float]) -> float:
    return max(values, key=lambda value: value if math.isfinite(value) else math.inf)


def _drawn(value: float, low: float, high: float, levels: str) -> str:
    if not math.isfinite(value):
        return BAD
    if value <= 0:
        return " "
    share = (math.log(value) - low) / (high - low) if high > low else 0.0
    return levels[min(len(levels) - 1, round(share * (len(levels) - 1)))]

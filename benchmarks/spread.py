"""Medians with their quartiles, over the rounds of a measurement."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """The median of some numbers and the quartiles around it; NaN if there are no numbers."""

    middle: float
    low: float
    high: float

    def times(self, factor: float) -> Spread:
        """Returns the spread of the numbers multiplied by a factor, which must not be negative."""
        return Spread(self.middle * factor, self.low * factor, self.high * factor)


def spread(numbers: Sequence[float]) -> Spread:
    """Returns the median and the quartiles of some numbers (method "inclusive").

    Args:
        numbers: May be empty; a single NaN makes all three results NaN.
    """
    if not numbers or any(map(math.isnan, numbers)):
        return Spread(math.nan, math.nan, math.nan)
    if len(numbers) == 1:
        return Spread(numbers[0], numbers[0], numbers[0])
    low, middle, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return Spread(middle, low, high)


def ratios(mine: Sequence[float], base: Sequence[float]) -> list[float]:
    """Divides round by round.

    Args:
        mine: Seconds that a variant added in each round.
        base: Seconds that ``clip_grad_norm_`` added in the same rounds.

    Returns:
        A ratio for each round; NaN if the base was lost in the noise (0 or less).
    """
    return [a / b if b > 0 else math.nan for a, b in zip(mine, base, strict=True)]


def ratio(mine: Sequence[float], base: Sequence[float]) -> Spread:
    """Divides the medians over all rounds; the quartiles are those of the ratios per round.

    Args:
        mine: Seconds that a variant added in each round.
        base: Seconds that ``clip_grad_norm_`` added in the same rounds.

    Returns:
        The spread; its median is NaN if the median of the base was lost in the noise.
    """
    bottom = spread(base).middle
    each = spread([value for value in ratios(mine, base) if not math.isnan(value)])
    middle = spread(mine).middle / bottom if bottom > 0 else math.nan
    return Spread(middle, min(each.low, middle), max(each.high, middle))


def spread_text(value: Spread, form: str) -> str:
    """Formats a median, with the quartiles in brackets.

    Args:
        value: The spread; NaN becomes a dash.
        form: Format specification for each number, such as ``".3f"``.
    """
    if math.isnan(value.middle):
        return "-"
    return f"{value.middle:{form}} ({value.low:{form}} to {value.high:{form}})"

"""Comparing the two derivatives along a line, in spite of kinks and rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from gradwatch.explain.gradients.lines import Line
from gradwatch.explain.gradients.slopes import Slopes

_STEPS = (1.0, 1 / 16, 16.0, 1 / 256, 256.0)
_IN_ORDER = (3, 1, 0, 2, 4)  # the steps by size, as indices


@dataclass(frozen=True, slots=True)
class Comparison:
    """One derivative, computed in two ways.

    Attributes:
        analytic: By the graph.
        numeric: By central differences.
        agrees: Whether they are the same within the tolerance.
        settled: Whether the numeric one is the same for several steps. If not, what differs may be
            a jump or rounding.
        traceable: Whether either is above the rounding of the other.
    """

    analytic: float
    numeric: float
    agrees: bool
    settled: bool = True
    traceable: bool = True


def compare(slopes: Slopes, line: Line) -> Comparison:
    """Compares the derivatives along a line, with other steps where they differ.

    A smaller step leaves a kink nearby outside, a larger one is above the rounding of large
    outputs.

    Args:
        slopes: The derivatives.
        line: The line.

    Returns:
        The numbers and what to think of them.
    """
    analytic = slopes.analytic(line)
    tried: list[float] = []
    for factor in _STEPS:
        numeric = slopes.numeric(line, factor)
        tried.append(numeric)
        allowed = slopes.allowed(line, analytic, numeric)
        if abs(analytic - numeric) <= allowed:
            traceable = max(abs(analytic), abs(numeric)) > allowed
            return Comparison(analytic, numeric, True, traceable=traceable)
    return _disagreement(analytic, [tried[i] for i in _IN_ORDER])


def _disagreement(analytic: float, numeric: list[float]) -> Comparison:
    pairs = [(abs(a - b), b) for a, b in pairwise(numeric) if math.isfinite(a - b)]
    if not pairs:
        return Comparison(analytic, math.nan, False, settled=False)
    spread, best = min(pairs)
    settled = not math.isfinite(analytic) or 4 * spread < abs(analytic - best)
    return Comparison(analytic, best, False, settled)


def is_wrong(slopes: Slopes, line: Line, found: Comparison) -> bool:
    """Tells a wrong gradient from a place where there is none.

    A kink is a matter of one point, and a wrong gradient is wrong next to it as well. What differs
    is therefore compared again on both sides of it, all leaves moved by random amounts. A gradient
    of NaN where the function is finite is wrong in any case: a training would meet it.

    Args:
        slopes: The derivatives.
        line: Where they differ.
        found: How.
    """
    if not math.isfinite(found.analytic):
        return math.isfinite(slopes.numeric(line))
    for sign in (1.0, -1.0):
        try:
            with slopes.nearby(sign) as moved:
                again = compare(moved, line)
        except (RuntimeError, ValueError):  # outside of what the function is defined for
            continue
        if not again.agrees and again.settled:
            return True
    return False

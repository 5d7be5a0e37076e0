"""How far two series of numbers are apart, element by element."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]


def distance(a: Floats, b: Floats) -> Floats:
    """Measures how far numbers are apart, on a scale that has no unit.

    Args:
        a: float array.
        b: float array like it.

    Returns:
        ``|b - a| / (|a| + |b|)`` in float64: 0 where they are equal, both NaN included, 1 where
        their signs differ or one is 0, and infinity where only one is finite, or the kinds of
        non-finite differ.

    Example:
        >>> distance(np.array([1.0, 1.0, np.nan]), np.array([1.0, 3.0, 1.0])).tolist()
        [0.0, 0.5, inf]
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(all="ignore"):
        # Halved first: the sum of two large numbers is not to overflow.
        far = np.abs(b / 2 - a / 2) / (np.abs(a) / 2 + np.abs(b) / 2)
    far = np.where(np.isfinite(a) & np.isfinite(b), far, np.inf)
    result: Floats = np.where(same, 0.0, far)
    return result


def ratio(a: float, b: float) -> float:
    """Returns ``b / a``; NaN where that says nothing.

    Args:
        a: A number.
        b: Another.
    """
    if not (np.isfinite(a) and np.isfinite(b)) or a == 0:
        return float("nan")
    return b / a

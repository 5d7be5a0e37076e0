"""Moving averages of two numbers, and how far to trust them and their ratio."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class PairAverage:
    """Bias-corrected exponential moving averages of pairs, with their standard errors.

    These take the pairs for independent. All numbers are plain floats, and no scale is too large
    or too small: variances are kept by a root of their matrix, so nothing is ever squared.

    Args:
        beta: How much of the averages stays at each pair, between 0 and 1.
    """

    __slots__ = ("_beta", "_count", "_root", "_share", "mean_x", "mean_y")

    def __init__(self, beta: float) -> None:
        self._beta = beta
        self._count = 0.0  # 1 + beta + beta^2 + ...
        self._share = 0.0  # the sum of the squared weights: 1 / effective number of samples
        self._root = (0.0, 0.0, 0.0)
        self.mean_x = self.mean_y = math.nan
        """The averages; NaN before the first pair."""

    def push(self, x: float, y: float) -> None:
        """Takes a pair in; both must be finite."""
        if not self._count:
            self.mean_x, self.mean_y = x, y
        self._count = 1.0 + self._beta * self._count
        new = 1.0 / self._count
        self._share = (1.0 - new) ** 2 * self._share + new**2
        far_x, far_y = x - self.mean_x, y - self.mean_y
        self._root = _joined(self._root, far_x, far_y, new)
        self.mean_x, self.mean_y = self.mean_x + new * far_x, self.mean_y + new * far_y

    @property
    def error_y(self) -> float:
        """Standard error of the average of y; NaN before the second pair."""
        return self._error(math.hypot(*self._root[1:]))

    def error_ratio(self) -> float:
        """Returns the standard error of the ratio of the averages, by the delta method."""
        a, b, c = self._root
        ratio = over(self.mean_x, self.mean_y)
        return over(self._error(math.hypot(a - ratio * b, ratio * c)), abs(self.mean_y))

    def _error(self, deviation: float) -> float:
        # n_eff / (n_eff - 1) for the variance, 1 / n_eff for the mean.
        return (
            math.sqrt(self._share / (1.0 - self._share)) * deviation
            if self._count > 1
            else math.nan
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns plain finite numbers; ``beta`` is not among them."""
        started = self._count > 0
        return {
            "count": self._count,
            "share": self._share,
            "root": list(self._root),
            "means": [self.mean_x, self.mean_y] if started else [],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave."""
        self._count, self._share = float(state["count"]), float(state["share"])
        a, b, c = state["root"]
        self._root = (float(a), float(b), float(c))
        means = state["means"] or (math.nan, math.nan)
        self.mean_x, self.mean_y = float(means[0]), float(means[1])


def _joined(
    root: tuple[float, float, float], x: float, y: float, new: float
) -> tuple[float, float, float]:
    """Takes a sample of weight ``new`` into the root of a 2 x 2 covariance.

    The root is the triangle ``R = [[a, b], [0, c]]`` with ``R.T @ R`` the covariance. A row is
    added by a rotation, so no variance turns negative by rounding.
    """
    a, b, c = root
    x, y = math.sqrt(new) * x, math.sqrt(new) * y
    longer = math.hypot(a, x)
    cos, sin = (a / longer, x / longer) if longer else (1.0, 0.0)
    keep = math.sqrt(1.0 - new)
    return keep * longer, keep * (cos * b + sin * y), keep * math.hypot(c, cos * y - sin * b)


def over(number: float, divisor: float) -> float:
    """Divides; by 0 it gives an infinity, or NaN for 0 / 0."""
    return number / divisor if divisor else number * math.inf

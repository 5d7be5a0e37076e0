"""Two runs by parameter: whose gradients differ most."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.commands.comparing.differences import Floats, distance, ratio

if TYPE_CHECKING:
    import pandas as pd

    from gradwatch.history import History

ROWS = 1 << 18
"""Rows that are read of a run at once, about."""
BLOCKS = 16
"""Where a run has more, that many ranges of steps are read, from its first to its last step."""
KEYS = ["step", "parameter"]


@dataclass(frozen=True, slots=True)
class ParameterDifference:
    """How the gradient norm of a parameter differs over the steps that both runs have.

    Attributes:
        parameter: Its name.
        steps: Steps in which both have a gradient of it.
        a: Typical norm in A: geometric mean of those that are finite and not 0.
        b: The same in B.
        ratio: ``b / a``; NaN where one has none.
        largest_step: Step at which the two are furthest apart, in proportion; None where all are
            equal.
        largest_a: The norm in A there.
        largest_b: The norm in B there.
    """

    parameter: str
    steps: int
    a: float
    b: float
    ratio: float
    largest_step: int | None
    largest_a: float
    largest_b: float

    @property
    def weight(self) -> tuple[float, float]:
        """What to sort by: how far the typical norms are apart, and then the worst step."""
        middle = distance(np.array([self.a]), np.array([self.b]))
        worst = distance(np.array([self.largest_a]), np.array([self.largest_b]))
        return float(middle[0]), float(worst[0])


@dataclass(frozen=True, slots=True)
class ParametersCompared:
    """Two runs by parameter.

    Attributes:
        sampled: Whether only some ranges of steps were read.
        only_a: Parameters that B does not have.
        only_b: Parameters that A does not have.
        parameters: The others that had a gradient in both, those that differ most first.
    """

    sampled: bool
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    parameters: tuple[ParameterDifference, ...]


def compare_parameters(a: History, b: History) -> ParametersCompared:
    """Compares the parameters that both runs have, in the steps that both have.

    Args:
        a: A run.
        b: Another.
    """
    spans, sampled = _spans(a, b)
    sums = [_Sum(name) for name in a.names if name in set(b.names)]
    _read(a, b, spans, {one.name: one for one in sums})
    found = [one.result() for one in sums if one.steps]
    return ParametersCompared(
        sampled=sampled,
        only_a=tuple(name for name in a.names if name not in set(b.names)),
        only_b=tuple(name for name in b.names if name not in set(a.names)),
        parameters=tuple(sorted(found, key=lambda one: one.weight, reverse=True)),
    )


class _Sum:
    """What is known of a parameter after some ranges of steps."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.steps = 0
        self._logs = {"a": 0.0, "b": 0.0}
        self._counts = {"a": 0, "b": 0}
        self._worst = (0.0, 0, np.nan, np.nan)

    def add(self, steps: np.ndarray, a: Floats, b: Floats) -> None:
        """Takes some steps."""
        self.steps += len(steps)
        for side, norms in (("a", a), ("b", b)):
            usable = norms[np.isfinite(norms) & (norms > 0)].astype(np.float64)
            self._logs[side] += float(np.log(usable).sum())
            self._counts[side] += len(usable)
        far = distance(a, b)
        place = int(np.argmax(far))
        if far[place] > self._worst[0]:
            self._worst = (far[place], int(steps[place]), float(a[place]), float(b[place]))

    def result(self) -> ParameterDifference:
        """Returns what was found."""
        far, step, norm_a, norm_b = self._worst
        a, b = self._mean("a"), self._mean("b")
        largest = step if far > 0 else None
        return ParameterDifference(
            self.name, self.steps, a, b, ratio(a, b), largest, norm_a, norm_b
        )

    def _mean(self, side: str) -> float:
        count = self._counts[side]
        return float(np.exp(self._logs[side] / count)) if count else float("nan")


def _read(a: History, b: History, spans: Iterator[tuple[int, int]], sums: dict[str, _Sum]) -> None:
    for start, stop in spans:
        left, right = (_norms(one, start, stop) for one in (a, b))
        both = left.merge(right, on=KEYS, suffixes=("_a", "_b"))
        for name, rows in both.groupby("parameter", sort=False, observed=True):
            if (known := sums.get(str(name))) is not None:
                numbers = (rows[column].to_numpy() for column in ("grad_norm_a", "grad_norm_b"))
                known.add(rows["step"].to_numpy(), *numbers)


def _norms(history: History, start: int, stop: int) -> pd.DataFrame:
    frame = history.parameters(columns=["grad_norm"], start=start, stop=stop)
    distinct: pd.DataFrame = frame.drop_duplicates(KEYS, keep="last")
    return distinct


def _spans(a: History, b: History) -> tuple[Iterator[tuple[int, int]], bool]:
    """Chooses ranges of steps so that no more is read than fits."""
    steps = np.intersect1d(a.steps(()).index.to_numpy(), b.steps(()).index.to_numpy())
    if not len(steps):
        return iter(()), False
    first, last = int(steps[0]), int(steps[-1])
    length = max(1, ROWS // max(1, len(a.names), len(b.names)))
    starts = np.arange(first, last + 1, length)
    if len(starts) > BLOCKS:
        starts = np.linspace(first, last + 1 - length, BLOCKS).astype(np.int64)
    return _ranges(starts, length), bool(len(starts) * length < last + 1 - first)


def _ranges(starts: np.ndarray, length: int) -> Iterator[tuple[int, int]]:
    for start in starts.tolist():
        yield start, start + length

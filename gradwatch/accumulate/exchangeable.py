"""Whether the backwards of a step are micro-batches of one loss, which the noise scale assumes.

Micro-batches are *exchangeable*: it makes no difference which of them comes first. They reach the
same parameters, their graphs have the same shape and nothing in common, and their gradients differ
by chance only. The noise scale compares one of them with all. Where they are parts of a loss, or
different losses, that would measure something else, and the number would not show it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from itertools import chain, combinations, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradwatch.accumulate.counting import count_micro_batches
from gradwatch.hooks.graph import Graph
from gradwatch.measure.sketch import Sketch

PARTS = (
    "the backwards of a step reach different parameters in most steps, as parts of a loss or "
    "different losses do"
)
OTHER_LOSSES = (
    "the graphs of the backwards of a step differ in most steps, as those of different losses do"
)
ONE_FORWARD = "the backwards of a step are of the same forward, so they share their noise"
SAME_DATA = "the backwards of a step are of the same data, so they share their noise"
OTHER_MEANS = (
    "the first backward of a step differs from the others in the same way in every step: they are "
    "of different losses, or of data in a fixed order"
)
OTHER_SIZES = (
    "the gradients of the first backward of a step are larger, or smaller, than those of the "
    "others in most steps: they are micro-batches of different sizes, or losses of different weight"
)
OTHER_BATCHES = "the micro-batches of a step have different sizes, the same in most steps"

_USUAL = 0.4  # share of the windows in which the same difference makes it a habit of the loop
_BETA = 0.998  # the statistics span about 500 windows
_MEAN_BETA = 0.97  # the mean differences about 30
# Standard scores. Chance exceeds the first in about one of 1,000 runs. A difference that has the
# same direction in every window does so after 17 windows, before an estimate counts as valid.
_FOUND, _GONE = 4.0, 2.0
_MEANS_APART = 0.1  # |A - B|^2 as a share of |(A + B) / 2|^2; a smaller one hardly matters
_SIZES_APART = 0.15  # mean of (|a|^2 - |b|^2) / (|a|^2 + |b|^2)
_UNLIKE = 1.5  # the largest micro-batch in units of the smallest
_LARGEST = 1e140  # the square of a sum of such numbers is still a float

Vector = NDArray[np.float64]


class Exchangeability:
    """Follows from window to window whether its backwards are exchangeable."""

    def __init__(self) -> None:
        """Starts before the first window."""
        self._parameters = _Habit()
        self._shapes = _Habit()
        self._batches = _Habit(at_once=False)  # lengths that vary by chance are honest
        self._graphs = ""
        self._common: Set[int] | None = None
        self._with_last, self._with_second = _Contrast(), _Contrast()
        self._unit = 0.0

    def judge(
        self,
        reached: Sequence[Set[int]],
        graphs: Sequence[Graph | None],
        sketches: Sequence[Sketch | None],
        weights: Sequence[float],
    ) -> str:
        """Adds a window of several backwards, and judges it together with those before.

        Args:
            reached: The parameters that each backward has reached; empty if all have reached all.
            graphs: The graph of each backward; empty in windows that are not looked at.
            sketches: For each backward a sketch of the gradients up to it, not divided by anything;
                empty if there is none.
            weights: The weight of each backward; empty if not known.

        Returns:
            Why the backwards are not exchangeable; empty if they are.
        """
        sets = Counter(map(frozenset, reached))
        if self._parameters.is_usual(sets) or count_micro_batches(reached) < len(reached):
            return PARTS
        known = [graph for graph in graphs if graph is not None]
        if known and len(known) == len(graphs):
            # Where chance decides which parameters are reached, it decides about the graph, too.
            self._graphs = self._judge_graphs(known, by_chance=len(sets) > 1)
            if not self._graphs and len(set(weights)) == 1:
                self._graphs = self._judge_sizes(known)
        return self._graphs or self._judge_numbers(sketches, weights)

    def _judge_graphs(self, graphs: Sequence[Graph], by_chance: bool) -> str:
        seen: set[int] = set()
        for graph in graphs:
            if not seen.isdisjoint(graph.nodes):
                return ONE_FORWARD
            seen |= graph.nodes
        # Positions and masks are the same in all windows, data are not. Those of another length are
        # new in a window, but its data differ.
        common, before = _common(graphs), self._common
        self._common = common
        if before is not None and _have_same_data([graph.data - before for graph in graphs]):
            return SAME_DATA
        shapes = Counter(graph.shape for graph in graphs[: 1 if by_chance else None])
        return OTHER_LOSSES if self._shapes.is_usual(shapes) else ""

    def _judge_sizes(self, graphs: Sequence[Graph]) -> str:
        """Judges micro-batches whose losses have the same weight."""
        sizes = [graph.elements for graph in graphs]
        unlike = max(sizes) > _UNLIKE * min(sizes) > 0
        return OTHER_BATCHES if self._batches.is_usual(Counter(sizes if unlike else ())) else ""

    def _judge_numbers(self, sketches: Sequence[Sketch | None], weights: Sequence[float]) -> str:
        # Weights may be in any unit: in that of the first window no square overflows or vanishes.
        self._unit = self._unit or max(weights, default=0.0)
        added = _added(sketches, [weight / (self._unit or 1.0) for weight in weights])
        if added is not None:
            alike = len(set(weights)) == 1
            self._with_last.add(added[0], added[-1], alike)
            if len(added) > 2:
                self._with_second.add(added[0], added[1], alike)
        return self._with_last.found or self._with_second.found


def _common(graphs: Sequence[Graph]) -> Set[int]:
    """Returns the data that at least two backwards have."""
    counts = Counter(chain.from_iterable(graph.data for graph in graphs))
    return {one for one, count in counts.items() if count > 1}


def _have_same_data(data: Sequence[Set[int]]) -> bool:
    """Returns whether some backward has no other data than another one has, too."""
    pairs = combinations(filter(None, data), 2)
    return any(one <= other or other <= one for one, other in pairs)


def _added(sums: Sequence[Sketch | None], weights: Sequence[float]) -> list[Vector] | None:
    """Returns what each backward has added to a sketch, per unit of weight; None if not known."""
    known = [one for one in sums if one is not None]
    if len(known) < max(2, len(sums)) or len(weights) != len(known) or not all(weights):
        return None
    if len({one.shape for one in known}) > 1 or not all(map(_is_usable, known)):
        return None
    each = [known[0], *(after - before for before, after in pairwise(known))]
    parts = [part / weight for part, weight in zip(each, weights, strict=True)]
    return parts if all(map(_is_usable, parts)) else None


def _is_usable(numbers: Vector) -> bool:
    return bool((np.abs(numbers) < _LARGEST).all())  # false for a NaN


class _Habit:
    """Tells whether the backwards of a window differ in the same way in most windows.

    Where they differ by chance, they differ each time in another way: experts that no token was
    sent to, layers that were left out at random.
    """

    def __init__(self, at_once: bool = True) -> None:
        """Starts; ``at_once`` says whether a difference counts the first time it is seen."""
        self._windows = self._alike = 0.0
        self._before: Mapping[Any, int] | None = None if at_once else {}

    def is_usual(self, kinds: Mapping[Any, int]) -> bool:
        """Adds a window: how many of its backwards are of each kind."""
        self._windows = 1.0 + _BETA * self._windows
        self._alike *= _BETA
        if len(kinds) > 1:
            self._alike += self._before is None or kinds == self._before
            self._before = kinds
        return self._alike > _USUAL * self._windows


class _Contrast:
    """Compares the backwards at two positions of a window, over many windows.

    If they are exchangeable, their difference is as likely to point in any direction as in the
    opposite one, whatever has come before. So its cosine with the mean of the earlier differences
    is positive as often as negative, and the sum of these cosines, divided by the root of the sum
    of their squares, stays near 0. The same holds for the difference of the squared norms.
    """

    def __init__(self) -> None:
        self._mean_difference: Vector | None = None
        self._mean: Vector | None = None
        self._direction, self._size = _SignedSum(), _SignedSum()
        self.found = ""
        """How they differ; empty if by chance."""

    def add(self, one: Vector, other: Vector, alike: bool) -> None:
        """Adds the gradients of two backwards; ``alike`` says whether they have one weight."""
        difference, mean = one - other, (one + other) / 2
        if self._mean_difference is None or self._mean is None:
            self._mean_difference, self._mean = np.zeros_like(difference), np.zeros_like(mean)
        elif self._mean_difference.shape != difference.shape:
            return
        length = float(np.linalg.norm(difference) * np.linalg.norm(self._mean_difference))
        if length > 0:
            self._direction.add(float(difference @ self._mean_difference) / length)
        sizes = float(one @ one), float(other @ other)
        if alike and sum(sizes) > 0:
            self._size.add((sizes[0] - sizes[1]) / sum(sizes))
        self._mean_difference = _MEAN_BETA * self._mean_difference + difference
        self._mean = _MEAN_BETA * self._mean + mean
        self._judge(float(self._mean_difference @ self._mean_difference), self._mean)

    def _judge(self, apart: float, mean: Vector) -> None:
        limit = _GONE if self.found else _FOUND
        if self._direction.score > limit and apart > _MEANS_APART * float(mean @ mean):
            self.found = OTHER_MEANS
        elif abs(self._size.score) > limit and abs(self._size.mean) > _SIZES_APART:
            self.found = OTHER_SIZES
        else:
            self.found = ""


class _SignedSum:
    """The sum of numbers that are as likely positive as negative, and its standard score."""

    def __init__(self) -> None:
        self._count = self._sum = self._squares = 0.0

    def add(self, number: float) -> None:
        """Adds a number from -1 to 1."""
        self._count = 1.0 + _BETA * self._count
        self._sum = number + _BETA * self._sum
        self._squares = number**2 + _BETA**2 * self._squares

    @property
    def score(self) -> float:
        """The sum in standard deviations; 0 before the first number."""
        return self._sum / math.sqrt(self._squares) if self._squares > 0 else 0.0

    @property
    def mean(self) -> float:
        """The mean of the numbers; 0 before the first one."""
        return self._sum / self._count if self._count else 0.0

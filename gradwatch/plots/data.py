"""What a plot reads: steps of each optimizer, blocks of parameters, and which points to draw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gradwatch.record.columns import safe_text
from gradwatch.record.records import Layout

if TYPE_CHECKING:
    import pandas as pd

    from gradwatch.report.run_data import Records


Array = NDArray[Any]


def column_of(x: Array, columns: int) -> Array:
    """Finds the column of pixels of each point.

    Args:
        x: int array ``[points]``, rising.
        columns: How many there are over the whole width.

    Returns:
        int64 ``[points]``, rising.
    """
    span = int(x[-1]) - int(x[0]) + 1
    columns_of: Array = (x - x[0]) * columns // span
    return columns_of


def starts_of(columns: Array) -> Array:
    """Finds where runs of equal numbers begin.

    Args:
        columns: int array ``[points]``, not empty.
    """
    return np.concatenate([[0], np.flatnonzero(np.diff(columns)) + 1])


def extremes(x: Array, y: Array, columns: int) -> Array:
    """Chooses the lowest and the highest point of each column of pixels.

    Args:
        x: int array ``[points]``, rising.
        y: float array ``[points]``; NaN where nothing is drawn.
        columns: How many there are over the whole width.

    Returns:
        int64: the points to draw, rising; all of a short curve, at most two per column of a long
        one. A column of NaN keeps one of them, so that a gap stays a gap.
    """
    if len(x) <= 2 * columns:
        return np.arange(len(x))
    starts = starts_of(column_of(x, columns))
    sizes = np.diff(np.append(starts, len(x)))
    chosen = [
        _first(y == np.repeat(bound.reduceat(y, starts), sizes), starts, sizes)
        for bound in (np.fmin, np.fmax)
    ]
    return np.unique(np.concatenate(chosen))


def first_per_column(x: Array, columns: int) -> Array:
    """Chooses one mark for each column of pixels that has any.

    Args:
        x: int array ``[marks]``, rising.
        columns: How many there are over the whole width.

    Returns:
        Part of ``x``.
    """
    if len(x) <= columns:
        return x
    return x[starts_of(column_of(x, columns))]


def _first(wanted: Array, starts: Array, sizes: Array) -> Array:
    """Finds the first wanted point from each start on, or the start where there is none."""
    places = np.flatnonzero(wanted)
    groups = np.repeat(np.arange(len(starts)), sizes)[places]
    first: Array = starts.copy()
    # Written from the last to the first, so that the first one stays.
    first[groups[::-1]] = places[::-1]
    return first


@dataclass(frozen=True, slots=True)
class StepTrack:
    """The steps of one optimizer, oldest first.

    Attributes:
        optimizer: Its label.
        step: int64 ``[steps]``.
        columns: By name an array ``[steps]``.
    """

    optimizer: str
    step: Array
    columns: Mapping[str, Array]

    def __getitem__(self, name: str) -> Array:
        return self.columns[name]

    @property
    def bad(self) -> Array:
        """Bool ``[steps]``: whether a gradient was NaN or Inf."""
        return (self["nonfinite_parameters"] > 0) | ~np.isfinite(self["grad_norm"])


def step_tracks(
    history: Records, columns: Sequence[str], start: int | None, stop: int | None
) -> list[StepTrack]:
    """Reads the steps of each optimizer.

    Args:
        history: The run.
        columns: Columns of ``History.steps()``.
        start: The first step.
        stop: One after the last step.

    Returns:
        In the order in which the optimizers first stepped.
    """
    import pandas as pd

    frame = history.steps(["optimizer", *columns], start=start, stop=stop)
    codes, labels = pd.factorize(frame["optimizer"])
    steps = frame.index.to_numpy()
    arrays = {name: frame[name].to_numpy() for name in columns if name != "outcome"}
    if "outcome" in columns:
        arrays["applied"] = (frame["outcome"] == "applied").to_numpy(bool)
    return [
        StepTrack(str(label), steps[mine], {name: a[mine] for name, a in arrays.items()})
        for label, mine in ((label, codes == code) for code, label in enumerate(labels))
    ]


@dataclass(frozen=True, slots=True)
class Rows:
    """How parameters are gathered into rows.

    Attributes:
        labels: Name of each row, from above to below.
        row_of: int64 ``[parameters]``: the row of each parameter.
    """

    labels: tuple[str, ...]
    row_of: Array

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def rolled_up(self) -> bool:
        """Whether a row may stand for several parameters."""
        return len(self) < len(self.row_of)

    def norms(self, norms: Array, present: Array) -> Array:
        """Takes the norm of all gradients of each row.

        Args:
            norms: float64 ``[steps, parameters]``.
            present: bool like it: whether there was a gradient.

        Returns:
            float64 ``[steps, rows]``; NaN where there was no gradient, and not finite where one of
            them was not.
        """
        there = self.present(present)
        if not self.rolled_up:
            order = np.argsort(self.row_of)
            return np.where(there, norms[:, order], np.nan)
        squares = np.square(norms, where=present, out=np.zeros_like(norms))
        with np.errstate(invalid="ignore", over="ignore"):
            total = np.sqrt(self._gathered(np.add, squares))
        return np.where(there, total, np.nan)

    def present(self, present: Array) -> Array:
        """Tells in which rows there was a gradient.

        Args:
            present: bool ``[steps, parameters]``.

        Returns:
            bool ``[steps, rows]``.
        """
        if present.all():
            return np.ones((len(present), len(self)), bool)
        return self._gathered(np.logical_or, present)

    def _gathered(self, how: np.ufunc, matrix: Array) -> Array:
        order = np.argsort(self.row_of, kind="stable")
        starts = np.searchsorted(self.row_of[order], np.arange(len(self)))
        gathered: Array = how.reduceat(matrix[:, order], starts, axis=1)
        return gathered


def rows_of(layout: Layout, most: int) -> Rows:
    """Chooses the finest rows that fit.

    Args:
        layout: The parameters.
        most: How many rows there may be.

    Returns:
        Each parameter, else their modules, else modules higher up in the model, in model order; of
        a model that is flat and wide neighbours are put together.
    """
    keys: Sequence[str] = layout.names
    for keys in _coarser(layout):
        if len(dict.fromkeys(keys)) <= most:
            return _rows(keys)
    each = -(-len(keys) // most)
    return _rows([f"{keys[i - i % each]} \N{HORIZONTAL ELLIPSIS}" for i in range(len(keys))])


def _coarser(layout: Layout) -> Iterator[Sequence[str]]:
    yield layout.names
    parts = [module.split(".") for module in layout.modules]
    for depth in range(max(map(len, parts), default=0), 0, -1):
        yield [".".join(path[:depth]) for path in parts]


def _rows(keys: Sequence[str]) -> Rows:
    counts = Counter(keys)
    place = {key: row for row, key in enumerate(counts)}
    labels = [key if n == 1 else f"{key or 'model'} ({n})" for key, n in counts.items()]
    return Rows(tuple(labels), np.array([place[key] for key in keys], np.int64))


ROWS_AT_ONCE = 2_000_000
"""Rows of ``History.parameters()`` that are held in memory at once."""

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Block:
    """The numbers of some consecutive steps.

    Attributes:
        first: The first step.
        planes: By column of ``History.parameters()`` a float array ``[steps, parameters]``.
        present: bool array of that shape: whether there was a gradient; what ``planes`` holds
            elsewhere is NaN.
    """

    first: int
    planes: Mapping[str, Array]
    present: Array


def every_step(first: int, last: int) -> list[Range]:
    """Takes one range of steps that leaves none out."""
    return [(first, last + 1)]


def spread_steps(first: int, last: int, most: int, pieces: int) -> list[Range]:
    """Spreads ranges of steps evenly over a run.

    Args:
        first: Its first step.
        last: Its last step.
        most: How many steps they hold in all, at most.
        pieces: How many ranges.

    Returns:
        First step and one after the last of each; a single range where it covers the run.
    """
    if last - first + 1 <= most:
        return every_step(first, last)
    length = max(1, most // pieces)
    starts = np.linspace(first, last + 1 - length, pieces).astype(int).tolist()
    return [(start, start + length) for start in starts]


def blocks(
    history: Records, columns: Sequence[str], ranges: Iterable[Range], rows: int = ROWS_AT_ONCE
) -> Iterator[Block]:
    """Reads blocks, one after the other.

    Args:
        history: The run.
        columns: Columns of ``History.parameters()``.
        ranges: First step and one after the last of each.
        rows: How many rows to read at once.
    """
    place = {safe_text(name): index for index, name in enumerate(history.layout.names)}
    length = max(1, rows // max(1, len(place)))
    for start, stop in ranges:
        for first in range(start, stop, length):
            end = min(first + length, stop)
            frame = history.parameters(columns=columns, start=first, stop=end)
            yield _block(frame, columns, first, end - first, place)


def _block(
    frame: pd.DataFrame,
    columns: Sequence[str],
    first: int,
    steps: int,
    place: Mapping[str, int],
) -> Block:
    import pandas as pd

    codes, names = pd.factorize(frame["parameter"])
    parameter = np.array([place[name] for name in names], np.int64)[codes]
    where = (frame["step"].to_numpy() - first, parameter)
    present = np.zeros((steps, len(place)), bool)
    present[where] = True
    planes = {name: np.full(present.shape, np.nan, np.float64) for name in columns}
    for name, plane in planes.items():
        plane[where] = frame[name].to_numpy()
    return Block(first, planes, present)

"""Two runs by settings, by step and by parameter, and how far they are apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gradwatch.cli.arguments import open_run, run_name
from gradwatch.cli.terminal import as_json
from gradwatch.record.folder.meta import read_meta

if TYPE_CHECKING:
    import pandas as pd

    from gradwatch.history import History


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


ROWS = 1 << 18
"""Rows that are read of a run at once, about."""
BLOCKS = 16
"""Where a run has more, that many ranges of steps are read, from its first to its last step."""
PARAMETER_KEYS = ["step", "parameter"]


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
        both = left.merge(right, on=PARAMETER_KEYS, suffixes=("_a", "_b"))
        for name, rows in both.groupby("parameter", sort=False, observed=True):
            if (known := sums.get(str(name))) is not None:
                numbers = (rows[column].to_numpy() for column in ("grad_norm_a", "grad_norm_b"))
                known.add(rows["step"].to_numpy(), *numbers)


def _norms(history: History, start: int, stop: int) -> pd.DataFrame:
    frame = history.parameters(columns=["grad_norm"], start=start, stop=stop)
    distinct: pd.DataFrame = frame.drop_duplicates(PARAMETER_KEYS, keep="last")
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


PARTS = ("optimizers", "options", "versions")


def differing_settings(a: str, b: str) -> dict[str, tuple[Any, Any]]:
    """Compares optimizers, options of ``watch()`` and versions, those of the newest session.

    Args:
        a: A run folder.
        b: Another.

    Returns:
        By the path of a setting, ``optimizers.0.lr``, its two values; None where one has none.
    """
    mine, other = (dict(_flat("", _newest(run))) for run in (a, b))
    names = dict.fromkeys((*mine, *other))
    pairs = {name: (mine.get(name), other.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if as_json(pair[0]) != as_json(pair[1])}


def _newest(run: str) -> Mapping[str, Any]:
    sessions = read_meta(Path(run)).sessions
    newest = sessions[-1] if sessions else {}
    return {name: newest.get(name) for name in PARTS}


def _flat(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Takes nested settings apart."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping) or not value:
        yield path, value
        return
    for name, one in value.items():
        yield from _flat(f"{path}.{name}" if path else str(name), one)


MEASURED = ("grad_norm", "grad_norm_clipped", "clip_coef")
KNOWN_TO_SOME = ("loss", "lr", "clip_threshold", "loss_scale", "noise_scale")
"""Left out where one of the runs has no such number at all."""

READ = ("optimizer", *MEASURED, *KNOWN_TO_SOME)
STEP_KEYS = ["optimizer", "step"]


@dataclass(frozen=True, slots=True)
class ColumnDifference:
    """How a column of ``History.steps()`` differs over the steps that both runs have.

    Attributes:
        column: Its name.
        a: Median in A, of the finite numbers.
        b: Median in B.
        ratio: ``b / a``; NaN where that says nothing.
        first_step: First step at which it differs; None where it is the same in all.
        largest_step: Step at which the two are furthest apart, in proportion; None likewise.
        largest_a: The number in A there.
        largest_b: The number in B there.
    """

    column: str
    a: float
    b: float
    ratio: float
    first_step: int | None
    largest_step: int | None
    largest_a: float
    largest_b: float


@dataclass(frozen=True, slots=True)
class StepsCompared:
    """Two runs by step.

    Attributes:
        common: Steps that both have, of all optimizers.
        first_step: First of them at which a column differs; None where all are the same.
        first_columns: The columns that differ there.
        columns: One entry per column, those that differ most first.
    """

    common: int
    first_step: int | None
    first_columns: tuple[str, ...]
    columns: tuple[ColumnDifference, ...]


def compare_steps(a: History, b: History) -> StepsCompared:
    """Compares the steps that both runs have.

    Steps belong together where their numbers are equal; of several optimizers the first of A goes
    with the first of B, whatever they are called.

    Args:
        a: A run.
        b: Another.
    """
    left, right = _keyed(a), _keyed(b)
    common = left.index.intersection(right.index, sort=False)
    left, right = left.loc[common], right.loc[common]
    steps = common.get_level_values("step").to_numpy()
    names = [*MEASURED, *(name for name in KNOWN_TO_SOME if _known(left, right, name))]
    found = [_column(name, steps, left[name].to_numpy(), right[name].to_numpy()) for name in names]
    firsts = [one.first_step for one in found if one.first_step is not None]
    first = min(firsts, default=None)
    return StepsCompared(
        common=len(steps),
        first_step=first,
        first_columns=tuple(
            one.column for one in found if first is not None is not one.first_step == first
        ),
        columns=tuple(sorted(found, key=_weight, reverse=True)),
    )


def _keyed(history: History) -> pd.DataFrame:
    """Reads steps by place of the optimizer and number."""
    frame = history.steps(READ).reset_index()
    order = {label: place for place, label in enumerate(frame["optimizer"].unique())}
    frame["optimizer"] = frame["optimizer"].map(order)
    keyed: pd.DataFrame = frame.drop_duplicates(STEP_KEYS, keep="last").set_index(STEP_KEYS)
    return keyed


def _known(left: pd.DataFrame, right: pd.DataFrame, name: str) -> bool:
    return bool(left[name].notna().any() and right[name].notna().any())


def _column(name: str, steps: np.ndarray, a: Floats, b: Floats) -> ColumnDifference:
    far = distance(a, b)
    differs = np.flatnonzero(far > 0)
    middle_a, middle_b = _median(a), _median(b)
    place = int(np.argmax(far)) if len(differs) else None
    return ColumnDifference(
        column=name,
        a=middle_a,
        b=middle_b,
        ratio=ratio(middle_a, middle_b),
        first_step=int(steps[differs].min()) if len(differs) else None,
        largest_step=None if place is None else int(steps[place]),
        largest_a=float("nan") if place is None else float(a[place]),
        largest_b=float("nan") if place is None else float(b[place]),
    )


def _median(values: Floats) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else float("nan")


def _weight(one: ColumnDifference) -> tuple[float, float]:
    """Orders columns by how far their medians are apart, and then their worst step."""
    middle = distance(np.array([one.a]), np.array([one.b]))
    worst = distance(np.array([one.largest_a]), np.array([one.largest_b]))
    return float(middle[0]), float(worst[0])


TOTAL_COLUMNS = ("time_s", "clipped", "outcome", "nonfinite_parameters")


def totals(history: History) -> dict[str, float]:
    """Counts.

    Args:
        history: A run.

    Returns:
        By name: ``steps``, ``parameters``, ``seconds per step``, ``clipped`` (share of the applied
        steps), ``skipped`` and ``non-finite`` (steps), and ``events: kind`` for each kind.
    """
    steps = history.steps(TOTAL_COLUMNS)
    applied = steps["outcome"] == "applied"
    kinds = history.events()["kind"].value_counts()
    return {
        "steps": len(steps),
        "parameters": len(history.names),
        "seconds per step": _pace(steps),
        "clipped": float(steps["clipped"][applied].mean()) if applied.any() else float("nan"),
        "skipped": int((~applied).sum()),
        "non-finite": int((steps["nonfinite_parameters"] > 0).sum()),
        **{f"events: {kind}": int(amount) for kind, amount in kinds.items()},
    }


def _pace(steps: pd.DataFrame) -> float:
    """Returns the median time between steps, which a pause or a resumed run does not change."""
    between = np.diff(steps["time_s"].to_numpy())
    return float(np.median(between)) if len(between) else float("nan")


@dataclass(frozen=True, slots=True)
class Compared:
    """Two runs beside each other.

    Attributes:
        a: How A is called.
        b: How B is called.
        settings: By path the settings that differ, with the values of both.
        totals: By name a number of each; NaN where one run has none.
        steps: By step.
        parameters: By parameter.
    """

    a: str
    b: str
    settings: Mapping[str, tuple[Any, Any]]
    totals: Mapping[str, tuple[float, float]]
    steps: StepsCompared
    parameters: ParametersCompared


def compare(a: str, b: str) -> Compared:
    """Compares two runs.

    Args:
        a: A run folder.
        b: Another.

    Raises:
        CommandError: If one cannot be read.
    """
    left, right = open_run(a), open_run(b)
    return Compared(
        a=run_name(a),
        b=run_name(b),
        settings=differing_settings(a, b),
        totals=_beside(totals(left), totals(right)),
        steps=compare_steps(left, right),
        parameters=compare_parameters(left, right),
    )


def _beside(a: dict[str, float], b: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Puts numbers beside each other; a kind of event that one run does not have is 0 there."""
    return {name: (a.get(name, 0), b.get(name, 0)) for name in dict.fromkeys((*a, *b))}

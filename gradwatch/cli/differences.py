"""How two runs differ: their settings and totals, by step and by parameter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from gradwatch.cli.arguments import open_run, run_name
from gradwatch.cli.terminal import as_json
from gradwatch.record.columns import STEP_COLUMNS, STEP_DTYPES
from gradwatch.record.folder.meta import read_meta

if TYPE_CHECKING:
    import pandas as pd

    from gradwatch.history import History

Floats = NDArray[np.floating[Any]]

_COMPARED = [name for name in STEP_COLUMNS if STEP_DTYPES[name] is np.float64 and name != "time_s"]
"""Columns to compare; one is left out if one of the runs has no number in it at all."""

ROWS = 1 << 18
"""Approximate number of rows of the table of parameters to read from a run at once."""
_SPANS = 16
"""If a run has more, this many ranges of steps are read, from its first to its last step."""


@dataclass(frozen=True, slots=True)
class Compared:
    """The comparison of two runs.

    Attributes:
        a: Name of run A.
        b: Name of run B.
        settings: The settings that differ: by path, the values in A and B.
        totals: By name, a number of A and of B; NaN if a run has none.
        steps: How the steps differ that both runs have.
        parameters: How the parameters differ that both runs have.
    """

    a: str
    b: str
    settings: Mapping[str, tuple[Any, Any]]
    totals: Mapping[str, tuple[float, float]]
    steps: StepsCompared
    parameters: ParametersCompared


def compare(a: str, b: str) -> Compared:
    """Compares the runs in two folders.

    Raises:
        CommandError: If one cannot be read.
    """
    left, right = open_run(a), open_run(b)
    return Compared(
        a=run_name(a),
        b=run_name(b),
        settings=_differing_settings(a, b),
        # If one run has no event of a kind, its count is 0.
        totals=_pairs(_totals(left), _totals(right), 0),
        steps=_compare_steps(left, right),
        parameters=_compare_parameters(left, right),
    )


def _pairs(a: Mapping[str, Any], b: Mapping[str, Any], missing: Any) -> dict[str, tuple[Any, Any]]:
    return {name: (a.get(name, missing), b.get(name, missing)) for name in dict.fromkeys((*a, *b))}


def _differing_settings(a: str, b: str) -> dict[str, tuple[Any, Any]]:
    """Compares optimizers, options of ``watch()`` and versions of the newest sessions.

    Returns:
        By the path of a setting, such as ``optimizers.0.lr``, its two values; None if missing.
    """
    pairs = _pairs(_settings(a), _settings(b), None)
    # Compare as text: then two NaN are equal, and 1 and True are not.
    return {name: pair for name, pair in pairs.items() if as_json(pair[0]) != as_json(pair[1])}


def _settings(run: str) -> dict[str, Any]:
    sessions = read_meta(Path(run)).sessions
    newest = sessions[-1] if sessions else {}
    parts = {name: newest.get(name) for name in ("optimizers", "options", "versions")}
    return dict(_flat("", parts))


def _flat(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping) or not value:
        yield path, value
        return
    for name, one in value.items():
        yield from _flat(f"{path}.{name}" if path else str(name), one)


def _totals(history: History) -> dict[str, float]:
    """Returns totals of a run by name; ``clipped`` is a share of the applied steps."""
    steps = history.steps(("time_s", "clipped", "outcome", "nonfinite_parameters"))
    applied = steps["outcome"] == "applied"
    clipped = steps["clipped"][applied].dropna()  # where it is known
    kinds = history.events()["kind"].value_counts()
    # The median, because a pause or a resumed run hardly changes it.
    between = np.diff(steps["time_s"].to_numpy())
    return {
        "steps": len(steps),
        "parameters": len(history.names),
        "seconds per step": float(np.median(between)) if len(between) else math.nan,
        "clipped": float(clipped.mean()) if len(clipped) else math.nan,
        "skipped": int((~applied).sum()),
        "non-finite": int((steps["nonfinite_parameters"] > 0).sum()),
        **{f"events: {kind}": int(amount) for kind, amount in kinds.items()},
    }


@dataclass(frozen=True, slots=True)
class StepsCompared:
    """How two runs differ, by step.

    Attributes:
        common: Number of steps that both runs have, over all optimizers.
        first_step: First common step at which a column differs; None if all are equal.
        first_columns: The columns that differ at that step.
        columns: One entry per column, largest differences first.
    """

    common: int
    first_step: int | None
    first_columns: tuple[str, ...]
    columns: tuple[ColumnDifference, ...]


@dataclass(frozen=True, slots=True)
class ColumnDifference:
    """How a column of ``History.steps()`` differs over the steps that both runs have.

    Attributes:
        column: Name of the column.
        a: Median of the finite numbers in A.
        b: Median of the finite numbers in B.
        ratio: ``b / a``; NaN if one is not finite or ``a`` is 0.
        first_step: First step at which the column differs; None if it is equal at all steps.
        largest_step: Step with the largest relative difference; None if there is none.
        largest_a: The number in A at that step.
        largest_b: The number in B at that step.
    """

    column: str
    a: float
    b: float
    ratio: float
    first_step: int | None
    largest_step: int | None
    largest_a: float
    largest_b: float


def _compare_steps(a: History, b: History) -> StepsCompared:
    """Compares the steps that both runs have.

    Steps with the same number are compared. If there are several optimizers, the first of A is
    compared with the first of B, and so on, whatever their labels.
    """
    left, right = _by_optimizer_and_step(a), _by_optimizer_and_step(b)
    common = left.index.intersection(right.index, sort=False)
    left, right = left.loc[common], right.loc[common]
    steps = common.get_level_values("step").to_numpy()
    names = [n for n in _COMPARED if left[n].notna().any() and right[n].notna().any()]
    if all(frame["grad_norm_all"].equals(frame["grad_norm"]) for frame in (left, right)):
        names = [name for name in names if name != "grad_norm_all"]  # one optimizer: the same twice
    found = [_column(name, steps, left[name].to_numpy(), right[name].to_numpy()) for name in names]
    first = min((one.first_step for one in found if one.first_step is not None), default=None)
    # If no column differs, first is None like each first_step: hence the extra check.
    earliest = [one.column for one in found if first is not None and one.first_step == first]
    return StepsCompared(len(steps), first, tuple(earliest), tuple(_worst_first(found)))


def _by_optimizer_and_step(history: History) -> pd.DataFrame:
    keys = ["optimizer", "step"]
    frame = history.steps(("optimizer", *_COMPARED)).reset_index()
    order = {label: index for index, label in enumerate(frame["optimizer"].unique())}
    frame["optimizer"] = frame["optimizer"].map(order)
    # A loop that went back to an earlier step has it twice; pandas can only align unique keys.
    keyed: pd.DataFrame = frame.drop_duplicates(keys, keep="last").set_index(keys)
    return keyed


def _column(name: str, steps: np.ndarray, a: Floats, b: Floats) -> ColumnDifference:
    far = _distance(a, b)
    middle_a, middle_b = _median(a), _median(b)
    middles = (middle_a, middle_b, _ratio(middle_a, middle_b))
    differs = np.flatnonzero(far > 0)
    if not len(differs):
        return ColumnDifference(name, *middles, None, None, math.nan, math.nan)
    at = int(np.argmax(far))
    first, largest = int(steps[differs].min()), int(steps[at])
    return ColumnDifference(name, *middles, first, largest, float(a[at]), float(b[at]))


def _median(values: Floats) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else math.nan


@dataclass(frozen=True, slots=True)
class ParametersCompared:
    """How two runs differ, by parameter.

    Attributes:
        sampled: Whether only some ranges of steps were read.
        only_a: Parameters that only A has.
        only_b: Parameters that only B has.
        parameters: Parameters that had a gradient in both, largest differences first.
    """

    sampled: bool
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    parameters: tuple[ParameterDifference, ...]


@dataclass(frozen=True, slots=True)
class ParameterDifference:
    """How the gradient norm of a parameter differs over the steps that both runs have.

    Attributes:
        parameter: Name of the parameter.
        steps: Number of steps in which both runs have a gradient for it.
        a: Typical norm in A: the geometric mean of the norms that are finite and not 0.
        b: The same in B.
        ratio: ``b / a``; NaN if one is missing.
        largest_step: Step with the largest relative difference; None if all norms are equal.
        largest_a: The norm in A at that step.
        largest_b: The norm in B at that step.
    """

    parameter: str
    steps: int
    a: float
    b: float
    ratio: float
    largest_step: int | None
    largest_a: float
    largest_b: float


def _compare_parameters(a: History, b: History) -> ParametersCompared:
    """Compares the parameters that both runs have, at the steps that both have."""
    of_a, of_b = dict.fromkeys(a.names), dict.fromkeys(b.names)
    sums = {name: _NormSums(name) for name in of_a if name in of_b}
    starts, length, sampled = _spans(a, b)
    for start in starts:
        _add_span(sums, a, b, start, start + length)
    found = [one.result() for one in sums.values() if one.steps]
    return ParametersCompared(
        sampled=sampled,
        only_a=tuple(name for name in of_a if name not in of_b),
        only_b=tuple(name for name in of_b if name not in of_a),
        parameters=tuple(_worst_first(found)),
    )


def _spans(a: History, b: History) -> tuple[list[int], int, bool]:
    """Chooses ranges of steps that fit into memory and do not take too long to read.

    Returns:
        The first steps of the ranges, their length, and whether they leave out steps in between.
    """
    steps = np.intersect1d(a.steps(()).index.to_numpy(), b.steps(()).index.to_numpy())
    if not len(steps):
        return [], 0, False
    first, stop = int(steps[0]), int(steps[-1]) + 1
    length = max(1, ROWS // max(1, len(a.names), len(b.names)))
    starts = np.arange(first, stop, length)
    if len(starts) > _SPANS:
        starts = np.linspace(first, stop - length, _SPANS).astype(np.int64)
    return starts.tolist(), length, len(starts) * length < stop - first


def _add_span(sums: dict[str, _NormSums], a: History, b: History, start: int, stop: int) -> None:
    keys = ["step", "parameter"]
    left, right = (
        one.parameters(columns=["grad_norm"], start=start, stop=stop).drop_duplicates(
            keys, keep="last"
        )
        for one in (a, b)
    )
    both = left.merge(right, on=keys, suffixes=("_a", "_b"))
    for name, rows in both.groupby("parameter", sort=False, observed=True):
        if (known := sums.get(str(name))) is not None:
            numbers = (rows[column].to_numpy() for column in ("grad_norm_a", "grad_norm_b"))
            known.add(rows["step"].to_numpy(), *numbers)


class _NormSums:
    """Sums up the norms of one parameter over ranges of steps."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.steps = 0
        self._logs, self._counts = [0.0, 0.0], [0, 0]  # of A and of B
        self._worst = (0.0, 0, math.nan, math.nan)

    def add(self, steps: np.ndarray, a: Floats, b: Floats) -> None:
        """Adds the norms of A and B at some steps."""
        self.steps += len(steps)
        for side, norms in enumerate((a, b)):
            # Logarithms, for a geometric mean: one spike would dominate an arithmetic mean.
            usable = norms[np.isfinite(norms) & (norms > 0)].astype(np.float64)
            self._logs[side] += float(np.log(usable).sum())
            self._counts[side] += len(usable)
        far = _distance(a, b)
        at = int(np.argmax(far))
        if far[at] > self._worst[0]:
            self._worst = (far[at], int(steps[at]), float(a[at]), float(b[at]))

    def result(self) -> ParameterDifference:
        """Returns the difference over all steps added so far."""
        far, step, *norms = self._worst
        sums = zip(self._logs, self._counts, strict=True)
        a, b = (float(np.exp(logs / count)) if count else math.nan for logs, count in sums)
        largest = step if far > 0 else None
        return ParameterDifference(self.name, self.steps, a, b, _ratio(a, b), largest, *norms)


def _distance(a: Floats, b: Floats) -> Floats:
    """Returns the relative difference of numbers.

    Returns:
        ``|b - a| / (|a| + |b|)`` in float64: 0 if they are equal or both NaN, 1 if their signs
        differ or one is 0, and infinity if only one is finite or both are non-finite in different
        ways.

    Example:
        >>> _distance(np.array([1.0, 1.0, np.nan]), np.array([1.0, 3.0, 1.0])).tolist()
        [0.0, 0.5, inf]
    """
    # The run folder holds float32, in which the difference would be rounded to 1e-7.
    a, b = a.astype(np.float64), b.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(all="ignore"):
        # Halve first, so that the sum of two large numbers does not overflow.
        far = np.abs(b / 2 - a / 2) / (np.abs(a) / 2 + np.abs(b) / 2)
    far = np.where(np.isfinite(a) & np.isfinite(b), far, np.inf)
    result: Floats = np.where(same, 0.0, far)
    return result


def _ratio(a: float, b: float) -> float:
    """Returns ``b / a``; NaN if one is not finite or ``a`` is 0."""
    return b / a if math.isfinite(a) and math.isfinite(b) and a != 0 else math.nan


_Difference = TypeVar("_Difference", ParameterDifference, ColumnDifference)


def _worst_first(found: Sequence[_Difference]) -> list[_Difference]:
    """Sorts by the relative difference of the typical numbers, then of those at the worst step."""

    def apart(one: _Difference) -> tuple[float, float]:
        a, b = np.array([one.a, one.largest_a]), np.array([one.b, one.largest_b])
        middle, worst = _distance(a, b).tolist()
        return middle, worst

    return sorted(found, key=apart, reverse=True)

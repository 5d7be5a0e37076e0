"""Two runs by step: where they part, and which numbers differ most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.commands.comparing.differences import Floats, distance, ratio

if TYPE_CHECKING:
    import pandas as pd

    from gradwatch.history import History

MEASURED = ("grad_norm", "grad_norm_clipped", "clip_coef")
KNOWN_TO_SOME = ("loss", "lr", "clip_threshold", "loss_scale", "noise_scale")
"""Left out where one of the runs has no such number at all."""

READ = ("optimizer", *MEASURED, *KNOWN_TO_SOME)
KEYS = ["optimizer", "step"]


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
    keyed: pd.DataFrame = frame.drop_duplicates(KEYS, keep="last").set_index(KEYS)
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

"""StepTrack: the steps of one optimizer as arrays, only the columns that a plot needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.explain.plots.thinning import Array

if TYPE_CHECKING:
    from gradwatch.explain.report.records import Records


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

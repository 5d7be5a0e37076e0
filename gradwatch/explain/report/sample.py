"""Sample: per-parameter numbers of some steps, as matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.explain.report.thresholds import Thresholds
from gradwatch.explain.report.track import Array
from gradwatch.record.columns import safe_text

if TYPE_CHECKING:
    import pandas as pd

    from gradwatch.explain.report.records import Records

STATISTICS = ("zeros", "update_ratio")
"""Statistics that a rule looks at, where they were taken."""

_REACH = 4_096


@dataclass(frozen=True, slots=True)
class Sample:
    """What was read of the parameters.

    Attributes:
        steps: int64 ``[steps]``, rising.
        present: bool ``[steps, parameters]``: whether there was a gradient.
        norms: float64 like ``present``: norms before the clip; NaN where there was none.
        statistics: Further ones by name, like ``norms``; NaN where they were not taken.
    """

    steps: Array
    present: Array
    norms: Array
    statistics: Mapping[str, Array]

    def typical(self) -> Array:
        """Takes the median of the finite norms of each parameter.

        Returns:
            float64 ``[parameters]``, NaN where there is none.
        """
        return medians(self.norms)


def medians(matrix: Array) -> Array:
    """Takes the median of the finite numbers of each column.

    Args:
        matrix: float ``[rows, columns]``.

    Returns:
        float64 ``[columns]``, NaN where there is none.
    """
    sound = np.where(np.isfinite(matrix), matrix, np.nan)
    there = np.isfinite(sound).any(axis=0)
    result = np.full(matrix.shape[1], np.nan)
    if there.any():
        result[there] = np.nanmedian(sound[:, there], axis=0)
    return result


def ranges(first: int, last: int, limits: Thresholds, parameters: int) -> list[tuple[int, int]]:
    """Spreads ranges of steps over a run.

    Args:
        first: Its first step.
        last: Its last step.
        limits: How many ranges, how long, and how many rows at most.
        parameters: Rows per step.

    Returns:
        First step and one after the last of each; a single range where they cover the run.
    """
    allowed = limits.sample_rows // (limits.sample_blocks * max(parameters, 1))
    length = max(2, min(limits.sample_steps, allowed))
    if last - first + 1 <= limits.sample_blocks * length:
        return [(first, last + 1)]
    starts = np.linspace(first, last + 1 - length, limits.sample_blocks).astype(int)
    return [(int(start), int(start) + length) for start in starts]


def read_sample(records: Records, first: int, last: int, limits: Thresholds) -> Sample:
    """Reads a sample of a run.

    Args:
        records: The run.
        first: Its first step.
        last: Its last step.
        limits: How much to read.
    """
    import pandas as pd

    names = [safe_text(name) for name in records.layout.names]
    known = records.parameters(start=0, stop=0).columns
    wanted = [name for name in STATISTICS if name in known]
    frames = [
        records.parameters(columns=["grad_norm", *wanted], start=start, stop=stop)
        for start, stop in ranges(first, last, limits, len(names))
    ]
    sample = _matrices(pd.concat(frames, ignore_index=True), names, wanted)
    missed = [name for name in wanted if not np.isfinite(sample.statistics[name]).any()]
    if not missed:
        return sample
    # Statistics of every so many steps may lie between the ranges.
    reach = max(2, min(_REACH, limits.sample_rows // max(len(names), 1)))
    newest = records.parameters(columns=["grad_norm", *missed], start=last + 1 - reach)
    late = _matrices(newest, names, missed)
    return Sample(
        sample.steps, sample.present, sample.norms, {**sample.statistics, **late.statistics}
    )


def _matrices(frame: pd.DataFrame, names: Sequence[str], statistics: Sequence[str]) -> Sample:
    import pandas as pd

    steps, rows = np.unique(frame["step"].to_numpy(), return_inverse=True)
    columns = pd.Index(names).get_indexer(pd.Index(frame["parameter"]))
    shape = (len(steps), len(names))
    present = np.zeros(shape, bool)
    present[rows, columns] = True

    def matrix(name: str) -> Array:
        result = np.full(shape, np.nan)
        result[rows, columns] = frame[name].to_numpy()
        return result

    return Sample(steps, present, matrix("grad_norm"), {name: matrix(name) for name in statistics})

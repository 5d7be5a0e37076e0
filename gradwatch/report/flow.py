"""The gradient flow as a table: one row per parameter, from a sample of the steps."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.record.columns import Array, Source, Span, array_of, labels_in, safe_text
from gradwatch.report.run_data import ParameterSample, Range, read_sample, spread_steps

if TYPE_CHECKING:
    import pandas as pd

STATISTICS = ("weight_norm", "zeros")
"""Statistics that the table shows if ``watch(statistics=)`` asked for them."""

MOST_NUMBERS, PIECES = 3_000_000, 12
"""Maximum of numbers to read, and the number of step ranges that they are taken from."""


def flow(source: Source, span: Span) -> pd.DataFrame:
    """Makes the table; see :meth:`gradwatch.History.flow`."""
    import pandas as pd

    layout = source.layout()
    steps = source.steps(("step", "optimizer"), span)
    names = pd.Index([safe_text(name) for name in layout.names], name="parameter", dtype="str")
    elements = np.array([prod(shape) for shape in layout.shapes] or [0] * len(names), np.int64)
    sample = _sample(source, array_of(steps["step"]), len(names))
    # Give the dtype: for a table without rows pandas would guess object or float.
    columns = {
        "module": pd.array([safe_text(module) for module in layout.modules], dtype="str"),
        "elements": elements,
        **_numbers(sample, elements),
        "no_gradient": _no_gradient(
            sample.present, array_of(steps["step"]), labels_in(steps["optimizer"]).codes
        ),
    }
    table: pd.DataFrame = pd.DataFrame(columns, index=names)
    return table


def flow_ranges(first: int, last: int, parameters: int) -> list[Range]:
    """Chooses the ranges of steps that a table or a plot of the flow is made from."""
    return spread_steps(first, last, max(PIECES, MOST_NUMBERS // max(1, parameters)), PIECES)


def quantiles(matrix: Array, shares: tuple[float, ...]) -> Array:
    """Returns quantiles of each column, ignoring NaN.

    Args:
        matrix: float ``[steps, columns]``.
        shares: From 0 to 1.

    Returns:
        float64 ``[shares, columns]``; NaN if a column holds nothing else.
    """
    import pandas as pd

    # pandas skips NaN in C; np.nanquantile loops over the columns in Python.
    frame = pd.DataFrame(matrix)
    # Between Inf and a finite number there is no point to interpolate at.
    with np.errstate(invalid="ignore"):
        return np.stack([frame.quantile(share).to_numpy(float) for share in shares])


def _sample(source: Source, steps: Array, parameters: int) -> ParameterSample:
    taken = source.statistics()
    wanted = ["grad_norm", *(name for name in STATISTICS if name in taken)]
    if not len(steps):
        return read_sample(source, wanted, [])
    return read_sample(source, wanted, flow_ranges(int(steps.min()), int(steps.max()), parameters))


def _numbers(sample: ParameterSample, elements: Array) -> dict[str, Array]:
    norms, absent = sample["grad_norm"], np.full(sample.present.shape, np.nan)
    finite = np.isfinite(norms)
    sound = np.where(finite, norms, np.nan)
    weights = sample.columns.get("weight_norm", absent)
    grad_norm = _medians(sound)
    # This divides by weight norms of 0 and by unknown sizes; the results become NaN below.
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = sound / weights
        rms = grad_norm / np.sqrt(elements)
    return {
        "steps": sample.present.sum(axis=0),
        "grad_norm": grad_norm,
        "rms_grad": np.where(elements > 0, rms, np.nan),
        "weight_norm": _medians(weights),
        "relative_grad": _medians(np.where(np.isfinite(relative), relative, np.nan)),
        "zeros": _medians(sample.columns.get("zeros", absent)),
        "zero_steps": (norms == 0).sum(axis=0),
        "nonfinite_steps": (sample.present & ~finite).sum(axis=0),
    }


def _medians(matrix: Array) -> Array:
    # Not run_data.medians(), which leaves out Inf: weight norms that are Inf count here.
    median: Array = quantiles(matrix, (0.5,))[0]
    return median


def _no_gradient(present: Array, steps: Array, optimizers: Array) -> Array:
    """Returns, per parameter, the share of its optimizer's steps in which it had no gradient.

    The records do not say which optimizer steps a parameter. The best fit is the optimizer with the
    fewest steps, among those with at least as many steps as the parameter has gradients.
    """
    seen = present.sum(axis=0)
    if not len(steps):
        return np.full(len(seen), np.nan)
    share = len(present) / len(np.unique(steps))
    lengths = np.sort(np.unique(optimizers, return_counts=True)[1]) * share
    of = lengths[np.minimum(np.searchsorted(lengths, seen), len(lengths) - 1)]
    missing: Array = np.clip(1.0 - seen / of, 0.0, 1.0)
    return missing

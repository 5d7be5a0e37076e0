"""flow(): the table of the gradient flow, one row per parameter."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from gradwatch.explain.plots.blocks import Block, blocks
from gradwatch.explain.plots.flow_sample import quantiles, sample_ranges
from gradwatch.explain.plots.thinning import Array
from gradwatch.record.columns import safe_text

if TYPE_CHECKING:
    import pandas as pd

    from gradwatch.explain.report.records import Records

STATISTICS = ("weight_norm", "zeros")
"""Statistics that the table shows where ``watch(statistics=)`` took them."""


def flow(history: Records, start: int | None = None, stop: int | None = None) -> pd.DataFrame:
    """Makes the table that shows where gradients vanish, explode or stop.

    Where the run holds more than some million numbers, steps are sampled evenly over it; ``steps``
    says in how many of those there was a gradient.

    Args:
        history: The run.
        start: The first step.
        stop: One after the last step.

    Returns:
        Index ``parameter`` in model order; columns

        - ``module`` that owns it, ``elements`` (0 where the shape is not known)
        - ``steps``: with a gradient, of the steps that were looked at
        - ``grad_norm``: median norm before the clip of the finite ones; ``rms_grad``: that over
          the root of ``elements``
        - ``weight_norm``, ``relative_grad``: median norm of the weights, and of gradient norm over
          weight norm; NaN where that statistic was not taken
        - ``zeros``: median share of elements that are exactly 0; NaN where it was not taken
        - ``zero_steps``, ``nonfinite_steps``: steps in which the whole gradient was exactly 0, and
          in which it held a NaN or an Inf
        - ``no_gradient``: share of the steps that were looked at without a gradient; where there
          are several optimizers, of the steps of the one that fits best

    Raises:
        TypeError: If a bound is no integer.
    """
    import pandas as pd

    layout = history.layout
    steps = history.steps(["optimizer"], start=start, stop=stop)
    names = pd.Index([safe_text(name) for name in layout.names], name="parameter", dtype="str")
    elements = np.array([prod(shape) for shape in layout.shapes] or [0] * len(names), np.int64)
    block = _read(history, steps, len(names))
    columns = {
        "module": pd.array([safe_text(module) for module in layout.modules], dtype="str"),
        "elements": elements,
        **_numbers(block, elements),
        "no_gradient": _no_gradient(block, steps),
    }
    frame: pd.DataFrame = pd.DataFrame(columns, index=names)
    return frame


def _read(history: Records, steps: pd.DataFrame, parameters: int) -> Block:
    """Reads the steps that are looked at as one block; ``first`` of it says nothing."""
    known = history.parameters(columns=None, start=0, stop=0).columns
    wanted = ["grad_norm", *(name for name in STATISTICS if name in known)]
    if not len(steps):
        none = np.zeros((0, parameters))
        return Block(0, dict.fromkeys(wanted, none), none.astype(bool))
    ranges = sample_ranges(int(steps.index.min()), int(steps.index.max()), parameters)
    parts = list(blocks(history, wanted, ranges))
    planes = {name: np.concatenate([part.planes[name] for part in parts]) for name in wanted}
    return Block(0, planes, np.concatenate([part.present for part in parts]))


def _numbers(block: Block, elements: Array) -> dict[str, Array]:
    norms, absent = block.planes["grad_norm"], np.full(block.present.shape, np.nan)
    finite = np.isfinite(norms)
    sound = np.where(finite, norms, np.nan)
    weights = block.planes.get("weight_norm", absent)
    grad_norm = _median(sound)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = sound / weights
        rms = grad_norm / np.sqrt(elements)
    return {
        "steps": block.present.sum(axis=0),
        "grad_norm": grad_norm,
        "rms_grad": np.where(elements > 0, rms, np.nan),
        "weight_norm": _median(weights),
        "relative_grad": _median(np.where(np.isfinite(relative), relative, np.nan)),
        "zeros": _median(block.planes.get("zeros", absent)),
        "zero_steps": (norms == 0).sum(axis=0),
        "nonfinite_steps": (block.present & ~finite).sum(axis=0),
    }


def _median(matrix: Array) -> Array:
    median: Array = quantiles(matrix, (0.5,))[0]
    return median


def _no_gradient(block: Block, steps: pd.DataFrame) -> Any:
    """Which optimizer steps a parameter is not recorded: the shortest one that is long enough."""
    seen = block.present.sum(axis=0)
    share = len(block.present) / max(1, len(np.unique(steps.index)))
    lengths = np.sort(steps["optimizer"].value_counts().to_numpy()) * share
    if not len(lengths):
        return np.full(len(seen), np.nan)
    of = lengths[np.minimum(np.searchsorted(lengths, seen), len(lengths) - 1)]
    return np.clip(1.0 - seen / of, 0.0, 1.0)

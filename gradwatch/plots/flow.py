"""The gradient flow, layer by layer: as a table and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from gradwatch.plots.canvas import (
    BLUE,
    EMPTY,
    GREY,
    NONFINITE,
    ORANGE,
    SMALLEST_POINTS,
    canvas,
    dress,
    legend_below,
    log_norms,
    name_rows,
    say,
    tint,
)
from gradwatch.plots.data import (
    Array,
    Block,
    Range,
    Rows,
    blocks,
    rows_of,
    spread_steps,
    step_tracks,
)
from gradwatch.plots.norms import bounds
from gradwatch.record.columns import safe_text

if TYPE_CHECKING:
    import pandas as pd

    from gradwatch.report.run_data import Records


MOST_NUMBERS, PIECES = 3_000_000, 12
"""Numbers that are read at most, and the ranges of steps that they are taken from."""

BAND = (0.05, 0.5, 0.95)


@dataclass(frozen=True, slots=True)
class FlowSample:
    """What became of each row.

    Attributes:
        low: float64 ``[rows]``: 5th percentile of the positive norms; NaN where there is none.
        median: float64 ``[rows]``: their median.
        high: float64 ``[rows]``: their 95th percentile.
        zero: bool ``[rows]``: whether most norms are exactly 0.
        bad: int64 ``[rows]``: steps in which it was NaN or Inf.
        steps: int64 ``[rows]``: steps in which there was a gradient.
    """

    low: Array
    median: Array
    high: Array
    zero: Array
    bad: Array
    steps: Array


def sample_ranges(first: int, last: int, parameters: int) -> list[Range]:
    """Chooses the steps that a table or a plot of the flow looks at.

    Args:
        first: The first step of the run.
        last: The last one.
        parameters: Numbers per step.
    """
    return spread_steps(first, last, max(PIECES, MOST_NUMBERS // max(1, parameters)), PIECES)


def flow_sample(history: Records, rows: Rows, first: int, last: int) -> FlowSample:
    """Reads the norms and sums them up.

    Args:
        history: The run.
        rows: The rows.
        first: The first step.
        last: The last step.
    """
    read = blocks(history, ["grad_norm"], sample_ranges(first, last, len(rows.row_of)))
    parts = [
        (rows.norms(block.planes["grad_norm"], block.present), rows.present(block.present))
        for block in read
    ]
    norms = np.concatenate([norms for norms, _ in parts])
    there = np.concatenate([there for _, there in parts])
    finite = np.isfinite(norms)
    low, median, high = quantiles(np.where(finite & (norms > 0), norms, np.nan), BAND)
    zero = np.count_nonzero(finite & (norms == 0), axis=0) > there.sum(axis=0) / 2
    return FlowSample(low, median, high, zero, (there & ~finite).sum(axis=0), there.sum(axis=0))


def quantiles(matrix: Array, shares: tuple[float, ...]) -> Array:
    """Takes quantiles of the numbers of each column that are no NaN.

    Args:
        matrix: float ``[steps, columns]``.
        shares: From 0 to 1.

    Returns:
        float64 ``[shares, columns]``, NaN where there is none.
    """
    import pandas as pd

    frame = pd.DataFrame(matrix)
    return np.stack([frame.quantile(share).to_numpy(float) for share in shares])


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


ROW_INCHES, THINNEST_ROW_INCHES = 0.16, 0.088
LOWEST_INCHES, HIGHEST_INCHES = 3.0, 28.0
AROUND_INCHES = 1.1
EDGE = 0.985


def draw_flow(history: Records, ax: Axes | None, start: int | None, stop: int | None) -> Axes:
    """Draws the plot; see :func:`gradwatch.plots.plot_flow`."""
    layout = history.layout
    ax = canvas(ax, 8.5, _height(len(layout.names)) + AROUND_INCHES)
    dress(ax, "Gradient flow: norm by parameter, first layer above")
    ax.set_xlabel("gradient norm (L2): median of the steps, bar from 5 to 95 %")
    tracks = step_tracks(history, ("grad_norm",), start, stop)
    if not tracks or not layout.names:
        return say(ax, EMPTY)
    inches = ax.get_window_extent().height / ax.figure.dpi
    rows = rows_of(layout, max(1, int(inches / THINNEST_ROW_INCHES)))
    sample = flow_sample(history, rows, *bounds(tracks))
    ax.set_xscale("log")
    name_rows(ax, rows.labels)
    _draw_bands(ax, rows, sample, layout.shapes)
    _limit(ax, sample)
    log_norms(ax.xaxis)
    _mark(ax, sample)
    legend_below(ax, columns=3)
    return ax


def _height(names: int) -> float:
    """As high as comfortable, then as low as can be read."""
    comfortable = min(ROW_INCHES * names, max(9.0, THINNEST_ROW_INCHES * 1.02 * names))
    return min(max(comfortable, LOWEST_INCHES), HIGHEST_INCHES)


def _draw_bands(
    ax: Axes, rows: Rows, sample: FlowSample, shapes: Sequence[tuple[int, ...]]
) -> None:
    """Draws matrices and vectors as two curves: their norms are never alike."""
    matrix = np.zeros(len(rows), bool)
    ranks = np.array([len(shape) for shape in shapes] or [2] * len(rows.row_of))
    np.logical_or.at(matrix, rows.row_of, ranks >= 2)
    alone = matrix.all() or not matrix.any()
    kinds = (
        (matrix, BLUE, "o", "modules" if rows.rolled_up else "weights"),
        (~matrix, ORANGE, "D", "biases, norms and other vectors"),
    )
    for mask, color, marker, label in kinds:
        _draw_kind(ax, np.flatnonzero(mask), sample, color, marker, "median" if alone else label)


def _draw_kind(
    ax: Axes, rows: Array, sample: FlowSample, color: str, marker: str, label: str
) -> None:
    rows = rows[np.isfinite(sample.median[rows])]
    if not len(rows):
        return
    thick = min(5.0, max(2.0, 72 * ROW_INCHES * 0.5))
    low, median, high = sample.low[rows], sample.median[rows], sample.high[rows]
    shown: dict[str, Any] = {"color": color, "alpha": tint(ax, 0.3), "linewidth": thick}
    ax.hlines(rows, low, high, **shown)
    ax.plot(median, rows, color=color, linewidth=0.8, alpha=0.6)
    ax.plot(median, rows, marker, color=color, markersize=3.6, markeredgewidth=0, label=label)


def _limit(ax: Axes, sample: FlowSample) -> None:
    ends = np.concatenate([sample.low, sample.high])
    ends = ends[np.isfinite(ends)]
    low, high = (np.log10(ends.min()), np.log10(ends.max())) if len(ends) else (-1.0, 1.0)
    margin = max(0.06 * (high - low), (1.0 - (high - low)) / 2)
    ax.set_xlim(10 ** (low - margin), 10 ** (high + margin))


def _mark(ax: Axes, sample: FlowSample) -> None:
    """Marks at the edges what a logarithmic axis has no place for."""
    kinds = (
        (sample.bad > 0, EDGE, ">", NONFINITE, "NaN or Inf in a step"),
        (sample.zero, 1 - EDGE, "<", GREY, "exactly 0 in most steps"),
        (sample.steps == 0, 1 - EDGE, "x", GREY, "no gradient"),
    )
    for mask, place, marker, color, label in kinds:
        rows = np.flatnonzero(mask)
        if len(rows):
            ax.add_line(
                Line2D(
                    np.full(len(rows), place),
                    rows,
                    linestyle="",
                    marker=marker,
                    color=color,
                    markersize=SMALLEST_POINTS,
                    transform=ax.get_yaxis_transform(),
                    label=f"{label} ({len(rows):,})",
                )
            )

"""Plot of how often and how hard the clip acts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from gradwatch.plots.canvas import (
    AFTER,
    EMPTY,
    GREY,
    canvas,
    dress,
    inset,
    legend_below,
    log_norms,
    say,
    step_axis,
    tint,
    width_inches,
)
from gradwatch.plots.data import column_of
from gradwatch.plots.norms import colors_of, draw_curve, positive, thresholds
from gradwatch.record.columns import Array, Source, Span
from gradwatch.record.wording import counted
from gradwatch.report.run_data import OptimizerArrays, first_and_last, read_steps

COLUMNS = ("grad_norm", "clip_coef", "clip_threshold", "clipped")
WINDOWS, FEWEST_IN_WINDOW = 60, 10
BINS = 60
WIDE_STEPS, WIDE_SPREAD = 4.5, 2.0
"""Panel widths in inches with room for two legend columns, and for labels between powers of ten."""

QUANTILES = (1.0, 50.0, 99.0)
MEDIAN = 50.0
ROOM = 0.14
"""Share of the width that the label of a quantile takes."""


def draw_clipping(source: Source, ax: Axes | None, span: Span) -> Axes:
    """Draws the plot; see :meth:`gradwatch.History.plot_clipping`."""
    optimizers = read_steps(source, COLUMNS, span)
    ax = canvas(ax, 10.0, 4.4)
    dress(ax, "Clipping", grid=False)
    if not optimizers:
        return say(ax, EMPTY)
    ax.set_title(
        f"Clipping: {_summary(optimizers)}", loc="left", fontsize="medium", fontweight="bold"
    )
    gap = 0.75 / width_inches(ax)
    by_step = inset(ax, (0.0, 0.0, 0.62 - gap / 2, 1.0))
    spread = inset(ax, (0.62 + gap / 2, 0.0, 0.38 - gap / 2, 1.0))
    # Both panels are insets of the user's axes, which may be one of several in a figure.
    ax.set_axis_off()
    step_axis(by_step, *first_and_last(optimizers))
    colors = colors_of(optimizers)
    for steps, color in zip(optimizers, colors, strict=True):
        name = f"{steps.optimizer}: " if len(optimizers) > 1 else ""
        _draw_steps(by_step, steps, name, color)
        _draw_spread(spread, steps, name, color)
    for steps, color, label in thresholds(optimizers, colors):
        _draw_threshold(spread, positive(steps["clip_threshold"]), color, label)
    if len(optimizers) == 1:  # the marks of several would overlap
        _mark_quantiles(spread, optimizers[0])
    _finish_steps(by_step)
    _finish_spread(spread)
    return ax


def _summary(optimizers: Sequence[OptimizerArrays]) -> str:
    clipped = sum(int((steps["clipped"][steps.clip_known] == 1).sum()) for steps in optimizers)
    applied = sum(int(steps.clip_known.sum()) for steps in optimizers)
    if not applied and any(steps.applied.any() for steps in optimizers):
        return "not known"
    share = f"{100 * clipped / applied:.3g} %" if clipped else "none"
    return f"{share} of {counted(applied, 'applied step')}"


def _draw_steps(ax: Axes, steps: OptimizerArrays, name: str, color: str) -> None:
    edges, shares = _clipped_shares(steps)
    label = f"{name}clip rate (share of the steps around)"
    ax.stairs(shares, edges - 0.5, fill=True, color=color, alpha=tint(ax, 0.22), label=label)
    coef = np.where(np.isfinite(steps["clip_coef"]), steps["clip_coef"], np.nan)
    draw_curve(ax, steps.step, coef, color if name else AFTER, f"{name}clip coefficient")


def _clipped_shares(steps: OptimizerArrays) -> tuple[Array, Array]:
    """Returns the share of applied steps that were clipped, where known, per window of steps.

    Returns:
        The edges of the windows, int64 ``[windows + 1]``, and the shares, float64 ``[windows]``;
        NaN if the window has no such step.
    """
    step = steps.step
    windows = int(np.clip(len(step) // FEWEST_IN_WINDOW, 1, WINDOWS))
    window = column_of(step, windows)
    applied = np.bincount(window, steps.clip_known, windows)
    clipped = np.bincount(window, steps.clip_known & (steps["clipped"] == 1), windows)
    # Integer arithmetic, as in column_of(): otherwise an edge could lie within a step.
    edges = step[0] + np.arange(windows + 1) * (step[-1] + 1 - step[0]) // windows
    shares = np.full(windows, np.nan)
    return edges, np.divide(clipped, applied, where=applied > 0, out=shares)


def _finish_steps(ax: Axes) -> None:
    dress(ax)
    # Always show 0 to 1, so that plots can be compared, and more if the data go beyond.
    low, high = ax.get_ylim()
    ax.set_ylim(min(0.0, low), max(1.04, high))
    ax.set_ylabel("factor, share")
    legend_below(ax, columns=2 if width_inches(ax) >= WIDE_STEPS else 1)


def _draw_spread(ax: Axes, steps: OptimizerArrays, name: str, color: str) -> None:
    norms, edges = _norms_and_edges(steps)
    if len(norms):
        counts = np.histogram(norms, edges)[0] / len(norms)
        look: dict[str, Any] = {"fill": True, "color": color, "alpha": tint(ax, 0.55)}
        ax.stairs(100 * counts, edges, label=f"{name}norms before the clip", **look)


def _norms_and_edges(steps: OptimizerArrays) -> tuple[Array, Array]:
    """Returns the positive norms, and bins of equal width on the logarithmic axis.

    The bins cover all norms and thresholds.
    """
    norms, threshold = positive(steps["grad_norm"]), positive(steps["clip_threshold"])
    norms = norms[np.isfinite(norms)]
    if not len(norms):
        return norms, norms
    ends = np.log10(np.concatenate([norms, threshold[np.isfinite(threshold)]]))
    low, high = float(ends.min()), float(ends.max())
    # At least half a decade, so that a steady norm is a peak, not a block as wide as the panel.
    missing = max(0.02, (0.5 - (high - low)) / 2)
    return norms, np.logspace(low - missing, high + missing, BINS + 1)


def _mark_quantiles(ax: Axes, steps: OptimizerArrays) -> None:
    """Marks the median, and the other quantiles if there is room beside it."""
    norms, edges = _norms_and_edges(steps)
    if not len(norms):
        return
    width = np.ptp(np.log10(edges))
    median = float(np.median(norms))
    for quantile, norm in zip(QUANTILES, np.percentile(norms, QUANTILES), strict=True):
        if quantile != MEDIAN and abs(np.log10(norm / median)) < ROOM * width:
            continue
        ax.axvline(norm, color=GREY, linewidth=0.8, linestyle=":")
        ax.annotate(
            f"{quantile:.0f} %",
            (norm, 1.0),
            xycoords=ax.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=7,
            color=GREY,
        )


def _draw_threshold(ax: Axes, threshold: Array, color: str, label: str) -> None:
    threshold = threshold[np.isfinite(threshold)]
    if not len(threshold):
        return
    # The threshold of an adaptive policy moves: a band shows its range.
    low, middle, high = np.percentile(threshold, [5, 50, 95])
    if high > low:
        ax.axvspan(low, high, color=color, alpha=tint(ax, 0.15), linewidth=0)
        label += " (median, 5 to 95 %)"
    ax.axvline(middle, color=color, linestyle=(0, (5, 2)), linewidth=1.3, label=label)


def _finish_spread(ax: Axes) -> None:
    dress(ax)
    # Not earlier: matplotlib warns about a logarithmic axis without a positive number.
    if ax.get_legend_handles_labels()[0]:
        ax.set_xscale("log")
        log_norms(ax.xaxis, 5, between=width_inches(ax) >= WIDE_SPREAD)
    else:
        say(ax, "no finite norm")
    ax.set_xlabel("total gradient norm (L2)")
    ax.set_ylabel("steps (%)")
    legend_below(ax, columns=1)

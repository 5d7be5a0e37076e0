"""The scale of a heat map: which colour a norm has."""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import Colormap, LogNorm

from gradwatch.explain.plots.palette import NO_GRADIENT_GREY, NORM_MAP, RELATIVE_MAP
from gradwatch.explain.plots.thinning import Array

TAIL = 0.5
"""Percent of the cells at each end that may lie outside of the scale: a spike must not take all
colours from the rest. It has the last colour."""

LEAST_FACTOR, LARGEST_FACTOR = 10.0, 1_000.0
"""Bounds of the scale of relative norms."""


def color_scale(values: Array, relative: bool) -> tuple[LogNorm, Colormap]:
    """Chooses the scale.

    Args:
        values: float64: the cells; what is not above 0 counts for nothing.
        relative: Whether they are relative to a typical one, 1.

    Returns:
        The scale and its colours.
    """
    some = values[np.isfinite(values) & (values > 0)]
    colors = colormaps[RELATIVE_MAP if relative else NORM_MAP].with_extremes(bad=NO_GRADIENT_GREY)
    if relative:
        factor = float(10 ** np.percentile(np.abs(np.log10(some)), 100 - TAIL)) if len(some) else 1
        factor = min(max(factor, LEAST_FACTOR), LARGEST_FACTOR)
        return LogNorm(1 / factor, factor), colors
    low, high = np.log10(np.percentile(some, [TAIL, 100 - TAIL])) if len(some) else (-1.0, 0.0)
    # Less than a decade would show noise as if it were a contrast.
    missing = max(0.0, 1.0 - (high - low)) / 2
    return LogNorm(float(10 ** (low - missing)), float(10 ** (high + missing))), colors

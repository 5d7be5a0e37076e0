"""Vanishing: gradients shrink from layer to layer toward the input."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradwatch.record.columns import Array
from gradwatch.report.finding import Evidence, Finding
from gradwatch.report.run_data import RunData, medians
from gradwatch.report.thresholds import Thresholds

_SMALLEST = 1e-45  # the smallest float32: stands for a gradient of zero in logarithms

TITLE = (
    "Gradients vanish with depth: a gradient element of the first layers is {ratio:.1e} times one "
    "of the last layers, a factor of {factor_per_layer:.2g} per layer over {layers:.0f} layers."
)
WHY = (
    "The first layers hardly learn, so the last ones work on random features. Each layer's "
    "activation and weights multiply the gradient by the factor per layer."
)
ADVICE = (
    "Replace sigmoid and tanh with ReLU or GELU, initialize for that (nn.init.kaiming_normal_), "
    "add residual connections or normalization. A larger learning rate does not help: the last "
    "layers limit it."
)


def vanishing(run: RunData, limits: Thresholds) -> Iterator[Finding]:
    """Finds a geometric fall of the gradient per element from the last layers to the first."""
    if not run.layout.shapes:
        return
    with np.errstate(invalid="ignore"):
        typical = medians(run.sample["grad_norm"]) / np.sqrt(run.sizes)
    # Per element, so that wide and narrow layers compare; only matrices, because biases and gains
    # have gradients of another scale.
    layers = np.flatnonzero(run.matrices & np.isfinite(typical))
    if len(layers) < limits.vanishing_layers or not typical[layers].any():
        return
    logs = np.log10(np.maximum(typical[layers], _SMALLEST))
    quarter = max(2, len(layers) // 4)
    # Quarters, not single layers: an embedding or a head is often unlike its neighbors.
    fall = float(np.median(logs[:quarter]) - np.median(logs[-quarter:]))
    trend = rank_correlation(logs)
    if fall < np.log10(limits.vanishing) and trend >= limits.vanishing_trend:
        numbers = {
            "ratio": 10**fall,
            "factor_per_layer": factor_per_layer(logs),
            "trend": trend,
            "layers": float(run.matrices.sum()),
        }
        names = tuple(run.layout.names[index] for index in layers[:quarter])
        span = (int(run.sample.steps[0]), int(run.sample.steps[-1]))
        seen = Evidence(span, names, numbers | {"limit": limits.vanishing})
        yield Finding("vanishing", "critical", TITLE.format(**numbers), seen, WHY, ADVICE)


def factor_per_layer(logs: Array) -> float:
    """Fits the factor by which a layer multiplies the gradient on its way back.

    Args:
        logs: float64 ``[layers]``: base-10 logarithms of the gradients, first layer first.
            Layers with a gradient of zero are left out of the fit.

    Returns:
        The factor per layer; 0 if fewer than two layers have a gradient above zero.

    Example:
        >>> round(factor_per_layer(np.array([-3.0, -2.0, -1.0, 0.0])), 6)
        0.1
    """
    layers = np.flatnonzero(logs > np.log10(_SMALLEST))
    # A line through a single point has no slope.
    if len(layers) < 2:
        return 0.0
    return float(10 ** -np.polyfit(layers, logs[layers], 1)[0])


def rank_correlation(values: Array) -> float:
    """Returns Spearman's correlation of values with their position.

    Args:
        values: float ``[n]``, without NaN.

    Returns:
        From -1 to 1; 0 if all values are equal.

    Example:
        >>> round(rank_correlation(np.array([1.0, 5.0, 7.0])), 3)
        1.0
    """
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    # Equal values share their mean rank, as in scipy.stats.spearmanr (SciPy is not a dependency).
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    if len(counts) < 2:
        return 0.0
    return float(np.corrcoef(ranks, np.arange(len(values)))[0, 1])

"""Percentiles over the parameters of a step, for a whole batch of steps at once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

QUANTILES = (0.05, 0.5, 0.95, 1.0)


def norm_spread(norms: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Takes the 5th, 50th, 95th and 100th percentile of each row.

    Only finite norms count: parameters without a gradient (-1) and those with a NaN or an Inf are
    left out. Percentiles between two norms are interpolated linearly, as ``numpy.percentile`` does.

    Args:
        norms: float array ``[steps, parameters]``; ``NO_GRADIENT`` (-1) where there was none.

    Returns:
        float64 array ``[steps, 4]``; NaN in a row that holds no finite norm.
    """
    if norms.shape[1] == 0:
        return np.full((len(norms), len(QUANTILES)), np.nan)
    usable = (norms >= 0) & (norms < np.inf)
    counts = np.count_nonzero(usable, axis=1)
    ascending = np.where(usable, norms, np.inf)
    ascending.sort(axis=1)

    position = np.maximum(counts - 1, 0)[:, None] * np.array(QUANTILES)
    lower = np.floor(position).astype(np.intp)
    upper = np.ceil(position).astype(np.intp)
    low = np.take_along_axis(ascending, lower, axis=1).astype(np.float64)
    high = np.take_along_axis(ascending, upper, axis=1).astype(np.float64)
    low[counts == 0] = high[counts == 0] = np.nan
    spread: NDArray[np.float64] = low + (position - lower) * (high - low)
    return spread

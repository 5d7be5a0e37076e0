"""WideMarks: cells of a heat map that are drawn at least so many pixels wide, at every size."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.backend_bases import RendererBase
from matplotlib.collections import PolyCollection

from gradwatch.explain.plots.thinning import Array

LEAST_PIXELS = 3.0


class WideMarks(PolyCollection):
    """Rectangles in data coordinates; how wide they must be is known when they are drawn only.

    Attributes:
        runs: float64 ``[marks, 4]``: left, right, lower and upper edge in the data.
    """

    def __init__(self, runs: Array, **look: Any) -> None:
        """Makes the marks.

        Args:
            runs: float64 ``[marks, 4]``: left, right, lower and upper edge.
            look: For ``PolyCollection``.
        """
        self.runs = runs
        super().__init__(_corners(runs), linewidths=0, antialiaseds=False, **look)

    def draw(self, renderer: RendererBase) -> None:
        """Draws them as wide as they must be."""
        axes = self.axes
        if axes is not None and self.get_visible():
            (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
            x = LEAST_PIXELS * abs(right - left) / max(axes.bbox.width, 1.0)
            y = LEAST_PIXELS * abs(high - low) / max(axes.bbox.height, 1.0)
            self.set_verts(
                _corners(
                    np.hstack([_at_least(self.runs[:, :2], x), _at_least(self.runs[:, 2:], y)])
                )
            )
        super().draw(renderer)


def runs_of(cells: Array, left: float, right: float) -> Array:
    """Joins cells that lie side by side.

    Args:
        cells: bool ``[rows, bins]``.
        left: Left edge of the first bin.
        right: Right edge of the last bin.

    Returns:
        float64 ``[marks, 4]`` for :class:`WideMarks`; row ``i`` lies between ``i - 0.5`` and
        ``i + 0.5``.
    """
    padded = np.pad(cells, ((0, 0), (1, 1))).astype(np.int8)
    change = np.diff(padded, axis=1)
    row, begin = np.nonzero(change == 1)
    end = np.nonzero(change == -1)[1]
    width = (right - left) / cells.shape[1]
    return np.stack([left + begin * width, left + end * width, row - 0.5, row + 0.5], axis=1)


def _at_least(edges: Array, size: float) -> Array:
    middle = edges.mean(axis=1, keepdims=True)
    half = np.maximum(np.abs(edges[:, 1:] - edges[:, :1]), size) / 2
    return np.hstack([middle - half, middle + half])


def _corners(runs: Array) -> Any:
    left, right, low, high = runs.T
    x = np.stack([left, left, right, right], axis=1)
    y = np.stack([low, high, high, low], axis=1)
    return np.stack([x, y], axis=2)

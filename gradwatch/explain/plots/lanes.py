"""Lanes: above a plot by step a line for each kind of event, with a mark where it happened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from gradwatch.explain.plots.canvas import PLAIN, SMALL, inset, pixel_columns
from gradwatch.explain.plots.palette import GREY, LANES
from gradwatch.explain.plots.thinning import Array, first_per_column

LANE_INCHES = 0.17


def draw_lanes(ax: Axes, lanes: Mapping[str, Array]) -> Axes | None:
    """Draws the lanes.

    Args:
        ax: The plot, whose axis of the steps they share.
        lanes: By kind the steps, rising.

    Returns:
        Their axes; None where there is no event.
    """
    order = [*LANES, *lanes]
    kinds = sorted((kind for kind in lanes if len(lanes[kind])), key=order.index)
    if not kinds:
        return None
    height = LANE_INCHES * ax.figure.dpi / max(1.0, ax.get_window_extent().height)
    lane = inset(ax, (0.0, 1.02, 1.0, height * len(kinds)), sharex=ax)
    lane.set_facecolor("none")
    for row, kind in enumerate(kinds):
        steps = first_per_column(np.unique(lanes[kind]), pixel_columns(ax))
        lane.axhline(row, color=GREY, alpha=0.25, linewidth=0.6, zorder=0)
        look: dict[str, Any] = {
            "color": LANES.get(kind, GREY),
            "markersize": 8.0,
            "markeredgewidth": 2.2,
        }
        lane.plot(steps, np.full(len(steps), row), "|", label=kind, **look)
    _label(lane, [f"{kind.replace('_', ' ')} ({len(lanes[kind]):,})" for kind in kinds])
    return lane


def _label(lane: Axes, labels: list[str]) -> None:
    lane.set_ylim(len(labels) - 0.4, -0.6)
    lane.set_yticks(range(len(labels)), labels, fontsize=SMALL, **PLAIN)
    lane.tick_params(which="both", length=0, labelbottom=False)
    lane.spines[:].set_visible(False)

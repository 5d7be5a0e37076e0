"""Plots of a run with matplotlib, which is loaded by the first of them only."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from gradwatch.report.run_data import Records


__all__ = ["plot_clipping", "plot_flow", "plot_heatmap", "plot_norms"]

MISSING = "{what} needs matplotlib, which is not installed. Run: pip install 'gradwatch[plot]'"


def plot_norms(
    history: Records,
    ax: Axes | None = None,
    *,
    start: int | None = None,
    stop: int | None = None,
) -> Axes:
    """Draws the total gradient norm by step, before and after the clip, and the events above it.

    Steps with a NaN or an Inf are marked at the upper edge, norms of exactly 0 at the lower one.
    Of a long run the smallest and the largest norm of each pixel column are drawn, so that every
    spike is there, and the running median.

    Args:
        history: The run.
        ax: Where to draw; a new figure if left out.
        start: The first step.
        stop: One after the last step.

    Returns:
        The axes; ``child_axes`` holds the lanes of the events, if there were any.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        TypeError: If ``ax`` is not an Axes, or a bound is no integer.
    """
    _need_matplotlib("plot_norms()")
    from gradwatch.plots.norms import draw_norms

    return draw_norms(history, ax, start, stop)


def plot_flow(
    history: Records,
    ax: Axes | None = None,
    *,
    start: int | None = None,
    stop: int | None = None,
) -> Axes:
    """Draws the gradient norm of each parameter, in model order from above to below.

    A dot is the median over the steps, a bar reaches from the 5th to the 95th percentile. Where
    there are more parameters than fit, they are rolled up by module (the norm of all gradients in
    it). Runs of many million numbers are sampled evenly.

    Args:
        history: The run.
        ax: Where to draw; a new figure, as high as the names need, if left out.
        start: The first step.
        stop: One after the last step.

    Returns:
        The axes.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        TypeError: If ``ax`` is not an Axes, or a bound is no integer.
    """
    _need_matplotlib("plot_flow()")
    from gradwatch.plots.flow import draw_flow

    return draw_flow(history, ax, start, stop)


def plot_heatmap(
    history: Records,
    ax: Axes | None = None,
    relative: bool = False,
    *,
    start: int | None = None,
    stop: int | None = None,
) -> Axes:
    """Draws the gradient norm of every parameter at every step as one picture.

    Each cell is the largest norm of its steps, on a logarithmic scale. Cells with a NaN or an Inf,
    and such that are exactly 0, have colours of their own and are never narrower than 3 pixels.
    Where there are more parameters than fit, they are rolled up by module (the norm of all
    gradients in it). Every number of the run is read: some 2 million per second from a folder;
    ``start`` and ``stop`` shorten that.

    Args:
        history: The run.
        ax: Where to draw; a new figure, as high as the names need, if left out.
        relative: Whether the colour is the norm over the parameter's own typical (median) norm.
        start: The first step.
        stop: One after the last step.

    Returns:
        The axes; ``child_axes`` holds the strip of the total norm and the scale of the colours.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        TypeError: If ``ax`` is not an Axes, or a bound is no integer.
    """
    _need_matplotlib("plot_heatmap()")
    from gradwatch.plots.heatmap import draw_heatmap

    return draw_heatmap(history, ax, relative, start, stop)


def plot_clipping(
    history: Records,
    ax: Axes | None = None,
    *,
    start: int | None = None,
    stop: int | None = None,
) -> Axes:
    """Draws how often and how hard the clip acts, and where its threshold lies among the norms.

    Args:
        history: The run.
        ax: Where to draw; a new figure if left out.
        start: The first step.
        stop: One after the last step.

    Returns:
        The axes, of which only the title is used; ``child_axes`` holds the two panels: clip
        coefficient and clip rate by step, and the distribution of the norms.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        TypeError: If ``ax`` is not an Axes, or a bound is no integer.
    """
    _need_matplotlib("plot_clipping()")
    from gradwatch.plots.clipping import draw_clipping

    return draw_clipping(history, ax, start, stop)


def _need_matplotlib(what: str) -> None:
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError(MISSING.format(what=what), name="matplotlib")

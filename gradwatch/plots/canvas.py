"""The axes of a plot: colors, scales, legends and the names of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, LogFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

from gradwatch.record.records import EVENT_KINDS

# Okabe and Ito 2008: distinguishable with every kind of color vision.
BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, GREY = "#56B4E9", "#CC79A7", "#8a94a3"

NORM_MAP = "viridis"
"""Color map of norms, dark to bright."""

RELATIVE_MAP = "BrBG_r"
"""Color map of norms relative to the typical one: green below it, brown above it."""

# The pink furthest from both maps, black and white, for normal sight and the three kinds of color
# blindness. The usual magenta #ff00aa looks like the middle of viridis to people who do not see
# green.
NONFINITE = "#FF33FF"
ZERO = "#000000"
NO_GRADIENT_GREY = "#c3cad4"

OPTIMIZERS = (BLUE, GREEN, PURPLE, SKY)
"""Color of the norm before the clip, by optimizer."""

BEFORE, AFTER, THRESHOLD = BLUE, ORANGE, VERMILLION

LANES = {
    # Skipped steps are taken from the steps, which include those that a scaler skipped.
    "not applied" if kind == "skipped" else kind: one.color
    for kind, one in EVENT_KINDS.items()
}
"""Color of the lane, by kind of event, and for steps that were not applied."""


PLAIN: dict[str, Any] = {"parse_math": False, "usetex": False}
"""Text options for names: a ``$`` or ``_`` in a parameter's name is not mathematics."""

SMALL = 8.0
EMPTY = "no steps yet"
LEAST_COLUMNS = 50
LEGEND_INCHES = 0.52
DARK = 1.5
"""Sum of red, green and blue below which a background is dark."""

FEW_DECADES = (1.6, 0.4)
"""Up to this many decades on an axis, some (or all) numbers between powers of ten are labeled."""

PADDING_INCHES = 0.1

LONGEST = 44
LARGEST_POINTS, SMALLEST_POINTS = 8.0, 5.5
POINTS_PER_INCH = 72

NO_AXES = (
    "ax must be a matplotlib Axes, got {kind}. For a figure pass figure.add_subplot(), for an "
    "array of axes one of them."
)


def canvas(ax: Axes | None, width: float, height: float) -> Axes:
    """Returns the user's axes, or the axes of a new figure.

    Args:
        ax: What the user passed; None for a new figure.
        width: Width of a new figure, in inches.
        height: Height of a new figure, in inches.

    Raises:
        TypeError: If ``ax`` is not an Axes.
    """
    if ax is None:
        # Only the constrained layout measures the labels, and names of parameters are long.
        layout = ConstrainedLayoutEngine(w_pad=PADDING_INCHES, h_pad=PADDING_INCHES)
        return plt.figure(figsize=(width, height), layout=layout).add_subplot()
    if not isinstance(ax, Axes):
        raise TypeError(NO_AXES.format(kind=type(ax).__name__))
    return ax


def dress(ax: Axes, title: str = "", *, grid: bool = True) -> None:
    """Removes the top and right lines, and adds a title and a faint grid."""
    ax.spines[["top", "right"]].set_visible(False)
    if title:
        ax.set_title(title, loc="left", fontsize="medium", fontweight="bold", **PLAIN)
    if grid:
        ax.grid(True, which="major", color=GREY, alpha=0.25, linewidth=0.6)
        ax.set_axisbelow(True)


def inset(ax: Axes, bounds: tuple[float, float, float, float], **more: Any) -> Axes:
    """Makes axes inside or beside other axes, with the same colors.

    Args:
        ax: The parent axes.
        bounds: Left, bottom, width and height, as shares of the parent's size.
        more: Passed to ``Axes.inset_axes``.
    """
    child = ax.inset_axes(bounds, **more)
    # inset_axes() uses the current style; copy the colors from the parent, so that a figure made
    # in a dark style stays dark.
    child.set_facecolor(ax.get_facecolor())
    ink = ink_of(ax)
    child.tick_params(which="both", color=ink, labelcolor=ink, labelsize=SMALL)
    for label in (child.xaxis.label, child.yaxis.label):
        label.set_color(ink)
    for name, spine in child.spines.items():
        spine.set_edgecolor(ax.spines[name].get_edgecolor())
    return child


def ink_of(ax: Axes) -> Any:
    """Returns the color of the axis labels."""
    return ax.xaxis.label.get_color()


def width_inches(ax: Axes) -> float:
    """Returns the width of the axes in inches."""
    return float(ax.get_window_extent().width) / ax.figure.dpi


def height_inches(ax: Axes) -> float:
    """Returns the height of the axes in inches."""
    return float(ax.get_window_extent().height) / ax.figure.dpi


def tint(ax: Axes, share: float) -> float:
    """Returns the opacity that on this background looks like ``share`` does on white."""
    return share if sum(to_rgb(ax.get_facecolor())) > DARK else min(1.0, 1.6 * share)


class _Between(LogFormatter):
    """Labels numbers between powers of ten, on an axis that shows hardly two powers."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """Formats 0.2 as "0.2"; LogFormatter would give "2e-1"."""
        return f"{x:g}" if super().__call__(x, pos) else ""


def log_norms(axis: Any, labels: int = 8, *, between: bool = True) -> None:
    """Labels powers of ten, and numbers between them if there are few.

    Args:
        axis: An axis with a logarithmic scale.
        labels: Maximum number of labeled powers of ten.
        between: Whether there is room for numbers between them.
    """
    axis.set_major_locator(LogLocator(numticks=labels))
    axis.set_minor_formatter(_Between(minor_thresholds=FEW_DECADES) if between else NullFormatter())
    axis.set_tick_params(which="minor", labelsize=SMALL)


def step_axis(ax: Axes, first: int, last: int) -> None:
    """Sets up the x axis for the steps from the first to the last."""
    # Half a step on both sides, as in the heatmap: even a run of one step has a width.
    ax.set_xlim(first - 0.5, last + 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    ax.xaxis.set_major_formatter(EngFormatter(sep="") if last >= 100_000 else "{x:,.0f}")
    ax.set_xlabel("optimizer step")


def legend_below(ax: Axes, handles: Sequence[Any] | None = None, columns: int = 5) -> None:
    """Puts the legend below the axes, where no data are.

    Args:
        ax: Axes with an x label.
        handles: The legend entries; None for everything that has a label.
        columns: Maximum number of entries side by side.
    """
    handles = ax.get_legend_handles_labels()[0] if handles is None else handles
    if handles:
        # An offset in inches: as a share of the height, in a low plot the legend would cover the
        # axis labels.
        below = ScaledTranslation(0.0, -LEGEND_INCHES, ax.figure.dpi_scale_trans)
        ax.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(0.0, 0.0),
            bbox_transform=ax.transAxes + below,
            ncols=min(len(handles), columns),
            frameon=False,
            fontsize=SMALL,
            borderaxespad=0.0,
            labelcolor=ink_of(ax),
            handlelength=1.6,
            columnspacing=1.6,
        )


def say(ax: Axes, text: str) -> Axes:
    """Writes a text into empty axes: why there is nothing to show."""
    center: dict[str, Any] = {"ha": "center", "va": "center", "transform": ax.transAxes}
    ax.text(0.5, 0.5, text, color=GREY, fontsize="large", **center)
    return ax


def pixel_columns(ax: Axes) -> int:
    """Returns about how many pixels wide the axes are."""
    return max(LEAST_COLUMNS, int(ax.get_window_extent().width))


def name_rows(ax: Axes, labels: Sequence[str]) -> None:
    """Labels the rows from top to bottom; if they are thin, only every second one, and so on."""
    points = POINTS_PER_INCH * height_inches(ax) / max(1, len(labels))
    # Rounded up. A line of text is 1.15 times as high as its font size.
    each = max(1, -int(-SMALLEST_POINTS * 1.15 // points))
    size = min(LARGEST_POINTS, max(SMALLEST_POINTS, points * each / 1.2))
    rows = range(0, len(labels), each)
    ax.set_yticks(rows, [short(labels[row]) for row in rows], fontsize=size, **PLAIN)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(labels) - 0.5, -0.5)


def short(name: str) -> str:
    r"""Shortens a name in its middle; characters outside ASCII are written as ``\xe9``."""
    # matplotlib warns about each character that its font lacks, and draws a box.
    text = name.replace("\N{HORIZONTAL ELLIPSIS}", "...")
    text = text.encode("ascii", "backslashreplace").decode()
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST // 3]}...{text[-(LONGEST - LONGEST // 3 - 3) :]}"

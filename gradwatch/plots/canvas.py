"""The axes of a plot: colours, scales, legends and the names of rows."""

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

# Okabe and Ito 2008: told apart with every kind of sight.
BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, GREY = "#56B4E9", "#CC79A7", "#8a94a3"

NORM_MAP = "viridis"
"""Colours of norms, dark to bright."""

RELATIVE_MAP = "BrBG_r"
"""Colours of norms over the typical one: green below it, brown above."""

# The pink that is furthest from both maps, black and white for all four kinds of sight; the usual
# magenta #ff00aa cannot be told from the middle of viridis by those who do not see green.
NONFINITE = "#FF33FF"
ZERO = "#000000"
NO_GRADIENT_GREY = "#c3cad4"

OPTIMIZERS = (BLUE, GREEN, PURPLE, SKY)
"""By optimizer the colour of its norm before the clip."""

BEFORE, AFTER, THRESHOLD = BLUE, ORANGE, VERMILLION

LANES = {
    # The steps themselves say that they were not applied, those that a scaler left out as well.
    "not applied" if kind == "skipped" else kind: one.color
    for kind, one in EVENT_KINDS.items()
}
"""By kind of event, and for steps that were not applied, the colour of its lane."""


PLAIN: dict[str, Any] = {"parse_math": False, "usetex": False}
"""How names are written: a parameter's name is never mathematics."""

SMALL = 8.0
EMPTY = "no steps yet"
LEAST_COLUMNS = 50
LEGEND_INCHES = 0.52
DARK = 1.5
"""Sum of red, green and blue below which a background is dark."""

FEW_DECADES = (1.6, 0.4)
"""Decades on an axis up to which some, and all, numbers between two powers of ten are labelled."""

PADDING_INCHES = 0.1

LONGEST = 44
LARGEST_POINTS, SMALLEST_POINTS = 8.0, 5.5
POINTS_PER_INCH = 72

NO_AXES = (
    "ax must be a matplotlib Axes, got {kind}. Of a figure take figure.add_subplot(), of an array "
    "of axes one of them."
)


def canvas(ax: Axes | None, width: float, height: float) -> Axes:
    """Returns the axes of the user, or those of a new figure.

    Args:
        ax: The axes of the user.
        width: Of a new figure, in inches.
        height: Of a new figure, in inches.

    Raises:
        TypeError: If ``ax`` is something else.
    """
    if ax is None:
        # Names of parameters are long: only this layout asks the labels how much room they need.
        layout = ConstrainedLayoutEngine(w_pad=PADDING_INCHES, h_pad=PADDING_INCHES)
        return plt.figure(figsize=(width, height), layout=layout).add_subplot()
    if not isinstance(ax, Axes):
        raise TypeError(NO_AXES.format(kind=type(ax).__name__))
    return ax


def dress(ax: Axes, title: str = "", *, grid: bool = True) -> None:
    """Removes lines that say nothing, and adds a title and a faint grid."""
    ax.spines[["top", "right"]].set_visible(False)
    if title:
        ax.set_title(title, loc="left", fontsize="medium", fontweight="bold", **PLAIN)
    if grid:
        ax.grid(True, which="major", color=GREY, alpha=0.25, linewidth=0.6)
        ax.set_axisbelow(True)


def inset(ax: Axes, bounds: tuple[float, float, float, float], **more: Any) -> Axes:
    """Makes axes beside or in others, with the same colours.

    Args:
        ax: The others.
        bounds: Left, lower, width and height in shares of the others' own.
        more: For ``Axes.inset_axes``.
    """
    child = ax.inset_axes(bounds, **more)
    # inset_axes() goes by the settings of this moment, the others by those of their making: a
    # figure that was made in a dark style stays dark.
    child.set_facecolor(ax.get_facecolor())
    ink = ink_of(ax)
    child.tick_params(which="both", color=ink, labelcolor=ink, labelsize=SMALL)
    for label in (child.xaxis.label, child.yaxis.label):
        label.set_color(ink)
    for name, spine in child.spines.items():
        spine.set_edgecolor(ax.spines[name].get_edgecolor())
    return child


def ink_of(ax: Axes) -> Any:
    """Returns the colour in which the axes are labelled."""
    return ax.xaxis.label.get_color()


def width_inches(ax: Axes) -> float:
    """Returns how wide the axes are."""
    return float(ax.get_window_extent().width) / ax.figure.dpi


def height_inches(ax: Axes) -> float:
    """Returns how high the axes are."""
    return float(ax.get_window_extent().height) / ax.figure.dpi


def tint(ax: Axes, share: float) -> float:
    """Chooses how opaque an area is that has this opacity on white: black needs more."""
    return share if sum(to_rgb(ax.get_facecolor())) > DARK else min(1.0, 1.6 * share)


class _Between(LogFormatter):
    """Labels 2, 3 and 6 between two powers of ten, on an axis that shows hardly two of them."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """Writes 0.2, where LogFormatter writes 2e-1."""
        return f"{x:g}" if super().__call__(x, pos) else ""


def log_norms(axis: Any, labels: int = 8, *, between: bool = True) -> None:
    """Labels the powers of ten, as many as there is room for, and numbers between where few are.

    Args:
        axis: An axis with a logarithmic scale.
        labels: How many powers of ten there may be.
        between: Whether there is room for numbers between them.
    """
    axis.set_major_locator(LogLocator(numticks=labels))
    axis.set_minor_formatter(_Between(minor_thresholds=FEW_DECADES) if between else NullFormatter())
    axis.set_tick_params(which="minor", labelsize=SMALL)


def step_axis(ax: Axes, first: int, last: int) -> None:
    """Sets up the axis of the steps from the first to the last."""
    # Half a step on both sides, as the picture of a heatmap has: a run of one step has a width.
    ax.set_xlim(first - 0.5, last + 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    ax.xaxis.set_major_formatter(EngFormatter(sep="") if last >= 100_000 else "{x:,.0f}")
    ax.set_xlabel("optimizer step")


def legend_below(ax: Axes, handles: Sequence[Any] | None = None, columns: int = 5) -> None:
    """Puts the legend where no data are.

    Args:
        ax: The axes.
        handles: What it lists; all that has a label if left out.
        columns: How many stand side by side at most.
    """
    handles = ax.get_legend_handles_labels()[0] if handles is None else handles
    if handles:
        # In inches below the axes: in shares of a low plot it would lie on the labels of the axis.
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
    """Writes into axes why they have nothing to show."""
    centre: dict[str, Any] = {"ha": "center", "va": "center", "transform": ax.transAxes}
    ax.text(0.5, 0.5, text, color=GREY, fontsize="large", **centre)
    return ax


def pixel_columns(ax: Axes) -> int:
    """Returns how many columns of pixels the axes have, about."""
    return max(LEAST_COLUMNS, int(ax.get_window_extent().width))


def name_rows(ax: Axes, labels: Sequence[str]) -> None:
    """Labels the rows, the first one above; where they are too thin every second one, and so on."""
    points = POINTS_PER_INCH * height_inches(ax) / max(1, len(labels))
    # Rounded up: 1.15 is the height of a line of text over its size.
    each = max(1, -int(-SMALLEST_POINTS * 1.15 // points))
    size = min(LARGEST_POINTS, max(SMALLEST_POINTS, points * each / 1.2))
    rows = range(0, len(labels), each)
    ax.set_yticks(rows, [short(labels[row]) for row in rows], fontsize=size, **PLAIN)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(labels) - 0.5, -0.5)


def short(name: str) -> str:
    r"""Shortens a name in its middle; letters that a font may lack are written as ``\xe9``."""
    # matplotlib warns of each letter that its font lacks, and draws a box.
    text = name.replace("\N{HORIZONTAL ELLIPSIS}", "...")
    text = text.encode("ascii", "backslashreplace").decode()
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST // 3]}...{text[-(LONGEST - LONGEST // 3 - 3) :]}"

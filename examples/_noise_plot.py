"""The plot of noise_scale.py: the noise scale, the batch that follows it, and the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MISSING = (
    "There will be no plot: it needs matplotlib, which is not installed. "
    "Run: pip install 'gradwatch[plot]'"
)
# Okabe and Ito's colors, distinguishable with every kind of color vision.
NOISE, BATCH, SMALL, LARGE = "#0072B2", "#D55E00", "#009E73", "#1f2933"
CHOSEN = "batch that auto chose"
FIRST = 20  # number of windows before a noise scale is valid
STYLE = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa5b1",
    "axes.facecolor": "#fbfbfa",
    "axes.grid": True,
    "grid.color": "#e4e7eb",
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Run:
    """The result of one training.

    Attributes:
        name: How its batch size was chosen.
        steps: ``watcher.history.steps()`` of the whole run; ``weight`` counts sequences.
        held_out: Loss on held-out text at the end, in nats per character.
        cpu_seconds: CPU time of the training, which hardly depends on how busy the machine is.
    """

    name: str
    steps: pd.DataFrame
    held_out: float
    cpu_seconds: float

    @property
    def number(self) -> int:
        """Number of optimizer steps."""
        return len(self.steps)

    @property
    def sequences(self) -> int:
        """Number of sequences that it was trained on."""
        return int(self.steps["weight"].sum())


def can_draw() -> bool:
    """Tells whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draws the first run in detail, and the losses of all runs.

    Args:
        runs: First the run whose batch followed the noise scale, then those to compare it with.
        path: The file to write; its suffix sets the format.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 7.4), dpi=130, layout="constrained")
        panels = ["step", "sequence"] if len(runs) > 1 else ["step", "step"]
        axes = figure.subplot_mosaic([["noise"] * 2, panels], height_ratios=[1.25, 1.0])
        _noise(axes["noise"], runs[0])
        for per in dict.fromkeys(panels):
            _loss(axes[per], runs, per)
        axes["step"].legend(loc="upper right")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _noise(axes: Axes, run: Run) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    steps = run.steps
    # Leave out the first few windows, and values below their own error: they say nothing.
    known = steps[(steps["noise_scale_stderr"] < steps["noise_scale"]) & (steps.index >= FIRST)]
    scale, error = known["noise_scale"], known["noise_scale_stderr"]
    label = "noise scale \N{PLUS-MINUS SIGN} one standard error"
    axes.fill_between(known.index, scale - error, scale + error, color=NOISE, alpha=0.2, lw=0)
    axes.plot(known.index, scale, color=NOISE, label=label)
    axes.step(steps.index, steps["weight"], where="post", color=BATCH, linewidth=2.2, label=CHOSEN)
    axes.set_yscale("log", base=2)
    axes.set(
        title="The batch follows the gradient noise scale",
        xlabel="optimizer step",
        ylabel="sequences",
        xlim=(0, run.number),
        ylim=(
            min([steps["weight"].min() / 2, *scale]),
            1.5 * max([steps["weight"].max(), *(scale + error)]),
        ),
    )
    axes.yaxis.set_major_locator(LogLocator(base=2))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.legend(loc="upper left")


def _loss(axes: Axes, runs: Sequence[Run], per: str) -> None:
    from matplotlib.ticker import StrMethodFormatter

    auto, per_step = runs[0], per == "step"
    looks = [(BATCH, 2.2, "-"), (SMALL, 1.6, "--"), (LARGE, 1.6, ":")]
    for run, (color, width, dashes) in zip(runs, looks, strict=False):
        losses = _smooth(run)
        x = losses.index if per_step else run.steps["weight"].cumsum()
        label = f"{run.name}: {run.number:,} steps"
        axes.plot(x, losses, color=color, linewidth=width, linestyle=dashes, label=label)
    axes.set(title=f"Loss by {per}", xlabel=f"{'optimizer ' * per_step}{per}s")
    axes.set_xlim(0, auto.number if per_step else auto.sequences)
    least = min(_smooth(run).min() for run in runs)
    axes.set_ylim(0.97 * least, 1.03 * _smooth(auto).iloc[auto.number // 40])
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_ylabel("nats per character" if per_step else "")


def _smooth(run: Run) -> pd.Series[float]:
    return run.steps["loss"].rolling(max(1, run.number // 40), min_periods=1).mean()

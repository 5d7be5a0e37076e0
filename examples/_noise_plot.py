"""The picture of noise_scale.py: the noise scale and the batch that follows it, and the loss."""

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
    "There will be no picture: it needs matplotlib, which is not installed. "
    "Run: pip install 'gradwatch[plot]'"
)
# Okabe and Ito's colours, which can be told apart with any kind of sight.
NOISE, BATCH, SMALL, LARGE = "#0072B2", "#D55E00", "#009E73", "#1f2933"
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
    """What became of one training.

    Attributes:
        name: How its batch was chosen.
        steps: ``watcher.history.steps()`` of all its steps; weights are sequences.
        held_out: Loss on held-out text at the end, in nats per character.
        seconds: What the training took.
    """

    name: str
    steps: pd.DataFrame
    held_out: float
    seconds: float

    @property
    def number(self) -> int:
        """Optimizer steps."""
        return len(self.steps)

    @property
    def sequences(self) -> int:
        """What it was trained on in all."""
        return int(self.steps["weight"].sum())


def can_draw() -> bool:
    """Tells whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draws the first run, and beside it the losses of the others.

    Args:
        runs: The one whose batch followed the noise scale, then those it is compared with.
        path: The file; its ending is the format.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 7.4), dpi=130, layout="constrained")
        top, bottom = figure.subfigures(2, 1, height_ratios=[1.25, 1.0])
        _noise(top.subplots(), runs[0])
        if len(runs) == 1:
            _loss(bottom.subplots(), runs, "step")
        else:
            by_step, by_sequence = bottom.subplots(1, 2, sharey=True)
            _loss(by_step, runs, "step")
            _loss(by_sequence, runs, "sequence")
            by_sequence.legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _noise(axes: Axes, run: Run) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    steps = run.steps
    # Where it is less than its error, it says nothing.
    known = steps[steps["noise_scale_stderr"] < steps["noise_scale"]]
    scale, error = known["noise_scale"], known["noise_scale_stderr"]
    label = "noise scale, \N{PLUS-MINUS SIGN} one standard error"
    axes.fill_between(known.index, scale - error, scale + error, color=NOISE, alpha=0.2, lw=0)
    axes.plot(known.index, scale, color=NOISE, label=label)
    batch = {"color": BATCH, "linewidth": 2.2, "label": "batch that auto chose"}
    axes.step(steps.index, steps["weight"], where="post", **batch)
    axes.set_yscale("log", base=2)
    low = min([steps["weight"].min(), *scale])
    axes.set(
        title="The batch follows the gradient noise scale",
        xlabel="optimizer step",
        ylabel="sequences",
        xlim=(0, run.number),
        ylim=(low / 1.5, 1.5 * max([steps["weight"].max(), *(scale + error)])),
    )
    axes.yaxis.set_major_locator(LogLocator(base=2))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.legend(loc="upper left")


def _loss(axes: Axes, runs: Sequence[Run], per: str) -> None:
    looks = [(BATCH, 2.2, "-"), (SMALL, 1.6, "--"), (LARGE, 1.6, ":")]
    for run, (color, width, dashes) in zip(runs, looks, strict=False):
        losses = run.steps["loss"].rolling(max(1, run.number // 40), min_periods=1).mean()
        x = losses.index if per == "step" else run.steps["weight"].cumsum()
        look = {"color": color, "linewidth": width, "linestyle": dashes}
        axes.plot(x, losses, label=run.name, **look)
    end = runs[0].number if per == "step" else runs[0].sequences
    axes.set(title=f"Loss per {per}", xlabel=f"{per}s", xlim=(0, end))
    axes.label_outer()
    axes.set_ylabel("nats per character" if per == "step" else "")

"""The plot: losses after spikes, and the cost of each kind of spike."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, PercentFormatter

from benchmarks.spikes.tables import Runs, excesses, pairs
from benchmarks.spikes.training import AUTO, AUTO_SKIP, BURST, CLEAN, POLICIES

INK, FAINT, GROUND = "#1f2933", "#9aa5b1", "#fbfbfa"
COLORS = {
    "no clip": "#7b8794",
    "fixed 1.0": "#e8a33d",
    "AutoClip p90": "#9b6bd3",
    "ZClip, published": "#d64545",
    "ZClip, winsorized": "#e88fb4",
    AUTO: "#1a66d6",
    AUTO_SKIP: "#2ba98f",
}
MARKS = {"burst": "o", "early": "^", "mislabelled": "s", "NaN": "x", "rise": "D"}
NAMES = {
    "burst": f"burst of {BURST} steps",
    "early": "one in the warm-up",
    "mislabelled": "mislabelled batches",
    "NaN": "one NaN",
    "rise": "lasting rise",
}
MARK_COLORS = dict(zip(MARKS, ("#1a66d6", "#d64545", "#e8a33d", "#1f2933", "#2ba98f"), strict=True))
UNHURT: dict[str, Any] = {"color": INK, "linewidth": 1.2, "linestyle": (0, (2, 2))}
DASHES = {  # offset dashes, so that curves on top of each other are all visible
    policy: (5 * number, (5, 10))
    for number, policy in enumerate(("no clip", "ZClip, published", "ZClip, winsorized"))
}
MOST = 10.0  # end of the axis: eleven times the loss of the clean run
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": GROUND,
    "figure.facecolor": "white",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": "#e4e7eb",
}


def draw(runs: Runs, path: Path) -> None:
    """Draws the results of the runs to a file; its suffix sets the format."""
    optimizers = list(dict.fromkeys(task.optimizer for task in runs))
    name = optimizers[0]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12.5, 9.2), dpi=130, layout="constrained")
        top, bottom = figure.subfigures(2, 1, height_ratios=[1.0, 1.15], hspace=0.04)
        shown = [policy for policy in COLORS if any(task.policy == policy for task in runs)]
        mine = {task: run for task, run in runs.items() if task.optimizer == name}
        burst, early, rise = top.subplots(1, 3)
        _losses(burst, mine, shown, "burst", f"A burst of {BURST} steps, {name}")
        _losses(early, mine, shown, "early", f"One spike in the warm-up, {name}")
        _acting(rise, mine, shown, f"Norms rise threefold for good, {name}")
        handles = [_line(policy) for policy in shown]
        handles.append(Line2D([], [], **UNHURT, label="auto, no spike"))
        above = {"loc": "outside upper center", "ncols": len(handles), "columnspacing": 1.4}
        top.legend(handles=handles, handlelength=1.6, frameon=False, **above)
        panels = bottom.subplots(1, len(optimizers), sharey=True, squeeze=False)[0]
        for axes, optimizer in zip(panels, optimizers, strict=True):
            _costs(axes, runs, optimizer)
        marks = [
            Line2D(
                [], [], color=MARK_COLORS[s], marker=m, linestyle="", markersize=7, label=NAMES[s]
            )
            for s, m in MARKS.items()
        ]
        bottom.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False)
        figure.savefig(path)


def _line(policy: str) -> Line2D:
    return Line2D([], [], label=policy, **_look(policy))


def _look(policy: str) -> dict[str, Any]:
    return {"color": COLORS[policy], "linewidth": 2.8 if policy == AUTO else 1.6}


def _mean_curve(runs: Runs, policy: str, scenario: str) -> tuple[list[int], list[float]]:
    curves = [dict(run.curve) for _, run, _ in pairs(runs, policy, scenario)]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    return steps, [statistics.fmean(curve[step] for curve in curves) for step in steps]


def _losses(axes: Axes, runs: Runs, policies: Sequence[str], scenario: str, title: str) -> None:
    spiked = next(task for task in runs if task.scenario == scenario).spiked
    begin, end = max(0, spiked[0] - 31), spiked[-1] + 80
    seen = []
    for policy in policies:
        steps, means = _mean_curve(runs, policy, scenario)
        order = 3 + (policy == AUTO)
        dashes = DASHES.get(policy, "-") if scenario == "early" else "-"
        axes.plot(steps, means, **_look(policy), linestyle=dashes, zorder=order)
        if policy not in ("no clip", "fixed 1.0"):
            seen += [m for step, m in zip(steps, means, strict=True) if begin < step <= end]
    steps, means = _mean_curve(runs, AUTO, CLEAN)
    axes.plot(steps, means, zorder=5, **UNHURT)
    seen += [m for step, m in zip(steps, means, strict=True) if begin < step <= end]
    axes.axvspan(spiked[0] - 1, spiked[-1], color="#f5d0c5", alpha=0.6, linewidth=0)
    axes.set(title=title, xlabel="step", xlim=(begin, end))
    axes.set_yscale("log")
    axes.set(ylim=(0.98 * min(seen), 1.04 * max(seen)), ylabel="held-out loss, nats per character")
    for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        which(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(axis="y", which="minor", labelsize=8.5)
    axes.grid(axis="y", which="both")


def _acting(axes: Axes, runs: Runs, policies: Sequence[str], title: str, span: int = 10) -> None:
    first = next(task for task in runs if task.scenario == "rise").middle
    for policy in policies:
        acted = [run.acted() for _, run, _ in pairs(runs, policy, "rise")]
        length = min(map(len, acted), default=0)
        shares = [
            statistics.fmean(a for one in acted for a in one[end - span : end])
            for end in range(span, length + 1)
        ]
        after = [end - first for end in range(span, length + 1)]
        axes.plot(after, shares, **_look(policy), zorder=3 + (policy == AUTO))
    axes.axvline(0, color="#e0836b", linewidth=1.2)
    axes.set(title=title, xlabel="steps after the rise")
    axes.set(
        ylabel=f"clipped or skipped, of the last {span} steps",
        xlim=(-40, length - first),
        ylim=(0, 1.03),
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(axis="y")


def _costs(axes: Axes, runs: Runs, optimizer: str) -> None:
    mine = {task: run for task, run in runs.items() if task.optimizer == optimizer}
    policies = [policy for policy in POLICIES if any(task.policy == policy for task in runs)]
    for row, policy in enumerate(policies):
        for lane, scenario in enumerate(MARKS):
            values = excesses(mine, policy, scenario)
            if not values:
                continue
            mean = statistics.fmean(min(MOST, v) if math.isfinite(v) else MOST for v in values)
            height = row + (lane - 2) * 0.14
            axes.plot(
                mean,
                height,
                MARKS[scenario],
                color=MARK_COLORS[scenario],
                markersize=6,
                clip_on=False,
            )
        if row % 2:
            axes.axhspan(row - 0.5, row + 0.5, color="#eef1f4", linewidth=0, zorder=0)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_xscale("symlog", linthresh=0.02, linscale=0.9)
    axes.set(xlim=(-0.02, MOST), ylim=(len(policies) - 0.5, -0.5), yticks=range(len(policies)))
    axes.set_yticklabels(policies)
    axes.set_xticks([-0.01, 0, 0.01, 0.02, 0.05, 0.2, 1, MOST])
    axes.xaxis.set_major_formatter(FuncFormatter(_share))
    axes.set(title=f"What a spike costs of the final loss, {optimizer}")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")


def _share(value: float, _: int) -> str:
    return "lost" if value >= MOST else f"{value:+.0%}" if value else "0"

"""The tables and the plot of SCALING.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.overhead.operators import OperatorTime
from benchmarks.page import table
from benchmarks.scaling.parameters import OPTIONS, Size
from benchmarks.scaling.ranks import Ranks
from benchmarks.scaling.steps import Reached
from benchmarks.spread import Spread, spread_text


def size_table(found: Sequence[Size]) -> str:
    """Formats the table of costs by number of parameters."""
    titles = ["tensors", "bare step, ms", *(f"{name}, adds ms" for name in OPTIONS)]
    rows = [
        [
            f"{size.tensors:,}",
            f"{size.bare_s * 1e3:.2f}",
            *(_ms(size.added_s[name]) for name in OPTIONS),
            f"{size.memory / 2**20:.1f}",
        ]
        for size in found
    ]
    return table([*titles, "memory, MB"], rows)


def step_table(found: Mapping[str, Sequence[Reached]]) -> str:
    """Formats the table of costs by number of steps."""
    rows = [
        [
            name,
            f"{reached.steps:,}",
            f"{reached.step_s * 1e6:.0f}",
            f"{reached.memory / 2**20:+.1f}",
            f"{reached.disk / 1e6:.2f}" if reached.disk else "-",
        ]
        for name, several in found.items()
        for reached in several
    ]
    titles = ["", "steps", "us per step, since the row above", "memory, MB", "disk, MB"]
    return table(titles, rows)


def rank_table(found: Sequence[Ranks]) -> str:
    """Formats the table of costs by number of ranks."""
    rows = [
        [
            each.kind,
            str(each.ranks),
            f"{each.bare_s * 1e3:.2f}",
            _ms(each.added_s),
            f"{each.collectives:+}",
            f"{each.payload:+,}",
        ]
        for each in found
    ]
    titles = ["", "ranks", "bare step, ms", "watch(clip=) adds, ms", "collectives", "their bytes"]
    return table(titles, rows)


def statistic_table(found: Mapping[str, Spread]) -> str:
    """Formats the table of costs by statistic."""
    return table(["statistics", "adds, ms"], [[name, _ms(added)] for name, added in found.items()])


def operator_text(time: OperatorTime, tensors: int) -> str:
    """Says how much of the time is spent outside PyTorch's operators."""
    return (
        f"`watch()` on {tensors:,} tensors of 16 elements adds {_ms(time.added_s)} ms to a "
        f"step. Its operators, called alone, take {_ms(time.operators_s)} ms; "
        f"{spread_text(time.outside, '.0%')} of the time is spent outside them."
    )


def _ms(seconds: Spread) -> str:
    return spread_text(seconds.times(1e3), ".3f")


def draw(
    path: Path,
    found: Sequence[Size],
    steps: Mapping[str, Sequence[Reached]],
    ranks: Sequence[Ranks],
    statistics: Mapping[str, Spread],
) -> None:
    """Draws all measurements in one figure of four panels; the suffix of the file is its format."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    _draw_sizes(axes[0, 0], found)
    _draw_steps(axes[0, 1], steps)
    _draw_ranks(axes[1, 0], ranks)
    names = list(statistics)
    axes[1, 1].barh(names, [statistics[name].middle * 1e3 for name in names])
    axes[1, 1].invert_yaxis()
    axes[1, 1].set(title="Statistics, 300 tensors", xlabel="added to a step, ms")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _draw_sizes(axes: Any, found: Sequence[Size]) -> None:
    for name in OPTIONS:
        spreads = [size.added_s[name] for size in found]
        _line(axes, [size.tensors for size in found], spreads, name)
    axes.plot([s.tensors for s in found], [s.bare_s * 1e3 for s in found], "k:", label="bare step")
    axes.set(xscale="log", yscale="log", xlabel="tensors", ylabel="added to a step, ms")
    axes.set_title("Parameters, 16 elements each")
    axes.legend(fontsize="small")


def _draw_steps(axes: Any, found: Mapping[str, Sequence[Reached]]) -> None:
    for name, several in found.items():
        numbers = [reached.steps for reached in several]
        axes.plot(numbers, [reached.step_s * 1e6 for reached in several], "o-", label=name)
    axes.set(xscale="log", xlabel="steps so far", ylabel="us per step", ylim=(0, None))
    axes.set_title("Steps")
    axes.legend(fontsize="small")


def _draw_ranks(axes: Any, found: Sequence[Ranks]) -> None:
    for kind in dict.fromkeys(each.kind for each in found):
        mine = [each for each in found if each.kind == kind]
        _line(axes, [each.ranks for each in mine], [each.added_s for each in mine], kind)
    axes.set(xlabel="ranks, with gloo", ylabel="added to a step, ms", title="Ranks, 60 tensors")
    axes.set_xticks(sorted({each.ranks for each in found}))
    axes.legend(fontsize="small")


def _line(axes: Any, x: Sequence[int], spreads: Sequence[Spread], name: str) -> None:
    low, high = ([getattr(each, side) * 1e3 for each in spreads] for side in ("low", "high"))
    axes.plot(x, [each.middle * 1e3 for each in spreads], "o-", label=name)
    axes.fill_between(x, low, high, alpha=0.2)

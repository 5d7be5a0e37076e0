"""RESULTS.md, rewritten after every setting, so that an interrupted run leaves a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.overhead.fixed_costs import FixedCosts
from benchmarks.overhead.other_tools import DISTRIBUTIONS, PEERS
from benchmarks.overhead.results import Result, Row, target_rows
from benchmarks.overhead.variants import BARE, CLIP, FLOOR, MAX_NORMS, Variant
from benchmarks.overhead.workloads import Setting
from benchmarks.page import table
from benchmarks.spread import spread, spread_text

HEAD = """# What gradwatch costs: results

`python -m benchmarks.overhead` wrote this page; do not edit it. Run `make bench` to get the numbers
of your machine.
"""

HOW = f"""## How to read it

All variants train the same model in the same process, and take turns of a few steps. With a process
or a model for each, they would differ by where their memory lies and by what else the machine does
meanwhile, which is as much as what is measured here. The bare loop has a turn after every two
others. What a variant adds in a turn is the median of its steps, minus that of the bare loop's
turns before and after. A round gives the median of these differences. The tables show the median
over the rounds, with the quartiles in brackets. The order of the variants is shuffled.

- *÷ clip* is what a variant adds, divided by what `{CLIP}` adds in the same round. A variant that
  does not clip is compared with a clip that changes nothing. A dash means that the clip itself was
  lost in the noise; the quartiles are those of the rounds in which it was not.
- Making records and passing them to TensorBoard and the run folder (every 64 steps or 5 seconds) is
  timed separately, including the work of the background thread, and divided among those steps.
- *{FLOOR}* is a sketch without records and without a check for NaN. It separates gradwatch's own
  cost from what the norms and the clip cost any tool on this machine.
- Between turns, the benchmark waits for the background threads of the other tools and for the
  process of `wandb`. That time is not counted, in their favor.
- *within* is the time per step inside a variant's own calls, over some steps in a row. It is
  steadier than the difference of two steps, but does not include effects on the rest of the step,
  or passing records on.
- *ATen calls* are the calls that a step makes beyond those of the bare loop; counted, not timed.
"""


@dataclass
class Report:
    """The content of RESULTS.md.

    Attributes:
        path: The file to write.
        machine: Properties of the machine, as names and values.
        failed: Tools that are installed but could not be started, with the reason.
        absent: Packages that could not be imported, with the reason.
        planned: The settings to be measured.
        notes: Remarks about this run.
        fixed: What is measured once.
        results: The settings measured so far.
    """

    path: Path
    machine: Sequence[tuple[str, str]]
    absent: Mapping[str, str]
    planned: Sequence[Setting]
    notes: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    fixed: FixedCosts = field(default_factory=FixedCosts)
    results: list[Result] = field(default_factory=list)

    def write(self) -> None:
        """Writes the page as it stands."""
        self.path.write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        """Returns the page as Markdown."""
        open_settings = [s.title for s in self.planned[len(self.results) :]]
        parts = [HEAD, table(["", ""], self.machine), *self.notes, *self._peers()]
        if open_settings:
            parts.append("**This run was not finished.** Not measured: " + "; ".join(open_settings))
        parts += ["## Targets", targets_table(target_rows(self.results, self.fixed))]
        for result in self.results:
            parts += [f"## {result.setting.title}", setting_table(result)]
        return "\n\n".join(part.strip("\n") for part in [*parts, HOW]) + "\n"

    def _peers(self) -> list[str]:
        lines = [
            f"- {name}: not measured, `{DISTRIBUTIONS[package]}` cannot be imported "
            f"({self.absent[package]})."
            for name, package in PEERS.items()
            if package in self.absent
        ]
        lines += [
            f"- {name}: not measured, it could not be started ({reason})."
            for name, reason in self.failed.items()
        ]
        return ["Tools that are missing here:\n\n" + "\n".join(lines)] if lines else []


def targets_table(rows: Sequence[Row]) -> str:
    """Formats the table of targets."""
    return table(
        ["what", "target", "measured", ""],
        [(row.what, row.limit, row.measured, f"**{row.verdict}**") for row in rows],
    )


def setting_table(result: Result) -> str:
    """Formats the table of a setting, and the line above it."""
    rounds, turns = len(result.rounds), result.turns
    head = (
        f"{BARE}: {result.bare_s * 1e3:.2f} ms per step. {rounds} rounds; variants with a target "
        f"have {turns} turn(s) in each round, others one; a turn has {result.steps} step(s)."
    )
    cuda = any(counts.kernels for counts in result.counts.values())
    exact = ["kernels", "host waits"] if cuda else ["ATen calls"]
    titles = ["", "added, ms", "of the bare step", "÷ clip", "within, ms", *exact]
    return head + "\n\n" + table(titles, [_row(result, each, cuda) for each in result.variants])


def _row(result: Result, variant: Variant, cuda: bool) -> list[str]:
    name = f"{variant.name}, {variant.regime}" if variant.regime in MAX_NORMS else variant.name
    count = result.count(variant)
    if count is None:
        exact = ["-"] * (1 + cuda)
    elif cuda:
        exact = [f"{count.kernels:+,}", f"{count.waits:+,}"]
    else:
        exact = [f"{count.calls:+,}"]
    return [
        name,
        spread_text(spread(result.added(variant)).times(1e3), ".3f"),
        spread_text(result.share(variant), ".1%"),
        spread_text(result.ratio(variant), ".2f"),
        spread_text(result.own_time.get(variant.key, spread([])).times(1e3), ".3f"),
        *exact,
    ]

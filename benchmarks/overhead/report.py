"""RESULTS.md, written anew after every setting, so that a run that is cut off leaves it."""

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

`python -m benchmarks.overhead` wrote this page; do not edit it. Run that again to have the numbers
of your machine: `make bench`.
"""

HOW = f"""## How to read it

All ways to train take turns of a few steps on one model within one process. With a process or a
model each, they would differ by where their memory lies and by what else the machine did meanwhile,
and that is as much as what is measured. The bare loop has its turn after every second other one;
what a way adds in a turn is the median of its steps less that of the bare loop's turns on both
sides. A round is the median of these differences; a table shows the median over the rounds, and
their quartiles in brackets. The order is shuffled.

- *÷ clip* is what a way adds over what `{CLIP}` adds in the same round; one that does not clip is
  held against a clip that changes nothing. A dash: the clip itself was lost in the noise. The
  quartiles are those of the rounds in which it was not.
- Writing records down, and handing them to TensorBoard and the run folder (every 64 steps or 5
  seconds), is timed by itself, the work of the background thread included, and shared out over
  those steps.
- *{FLOOR}* is a sketch without records and without a look for NaN, to tell what is gradwatch's own
  from what the clip and the norms cost anybody on this machine.
- The background threads of the peers are waited for between the turns and not counted, in favour
  of the peers; so is the process behind `wandb`.
- *within* is the time of a step inside of a way's own calls, on some steps in a row: steadier than
  the difference of two steps, but without what the step around it loses or gains, and without
  deliveries.
- *ATen calls* are those that a step makes beyond the bare loop, counted, not timed.
"""


@dataclass
class Report:
    """All that RESULTS.md says.

    Attributes:
        path: Where it is written.
        machine: What and its value, of the machine.
        failed: Peers that are installed and could not be started, and why.
        absent: Packages that could not be imported, and why.
        planned: The settings that are to be measured.
        notes: What a reader must know about this run.
        fixed: What is measured once.
        results: The settings that are measured.
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
        """Returns the page."""
        open_settings = [s.title for s in self.planned[len(self.results) :]]
        parts = [HEAD, table(["", ""], self.machine), *self.notes, *self._peers()]
        if open_settings:
            parts.append("**This run was not finished.** Not measured: " + "; ".join(open_settings))
        parts += ["## What was to be reached", targets_table(target_rows(self.results, self.fixed))]
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
        return ["Peers that are missing here:\n\n" + "\n".join(lines)] if lines else []


def targets_table(rows: Sequence[Row]) -> str:
    """Makes the table of what was to be reached."""
    return table(
        ["what", "to reach", "measured", ""],
        [(row.what, row.limit, row.measured, f"**{row.verdict}**") for row in rows],
    )


def setting_table(result: Result) -> str:
    """Makes the table of a setting, and the line above it."""
    rounds, turns = len(result.rounds), result.turns
    head = (
        f"{BARE}: {result.bare_s * 1e3:.2f} ms a step. {rounds} rounds; a way that a target hangs "
        f"on has {turns} turn(s) in each, others one, of {result.steps} steps."
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

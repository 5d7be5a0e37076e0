"""A report: what the rules found in a run, as text, in colour, as HTML and as plain data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from html import escape
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Group
from rich.padding import Padding
from rich.text import Text

from gradwatch.record.folder.files import plain_data
from gradwatch.report.finding import SEVERITIES, Evidence, Finding
from gradwatch.report.rules import ALWAYS, RULES
from gradwatch.report.run_data import Records, RunData, counted, named, printable, read_run
from gradwatch.report.thresholds import Thresholds

if TYPE_CHECKING:
    from rich.console import Group


EMPTY = "There is no step in this run yet."
FEW = (
    "Few steps ({count}, where most rules need {few}): only NaN and Inf, missing gradients, "
    "loss scales and norms that explode were looked at."
)
NO_UPDATES = (
    "How large updates are for their weights was not recorded: "
    'watch(..., statistics=("update_ratio",), every=10).'
)
NO_ZEROS = (
    'Dead units within a layer were not recorded: watch(..., statistics=("zeros",), every=10).'
)
NOT_FROM_START = (
    "The first steps, up to {step}, are not there, so that norms were compared with those of later "
    "ones: keep the run with watch(..., run_dir=...)."
)


def remarks(run: RunData | None, limits: Thresholds) -> Iterator[str]:
    """Lists what was not looked at.

    Args:
        run: The run; None where it is empty.
        limits: ``few_steps``.
    """
    if run is None:
        yield EMPTY
        return
    if len(run) < limits.few_steps:
        yield FEW.format(count=len(run), few=limits.few_steps)
    first = min(int(track.step[0]) for track in run.tracks)
    if first > 1:
        yield NOT_FROM_START.format(step=first - 1)
    for name, text in (("update_ratio", NO_UPDATES), ("zeros", NO_ZEROS)):
        taken = run.sample.statistics.get(name)
        if taken is None or not np.isfinite(taken).any():
            yield text


WIDTH = 100
NOTHING = "Nothing was found."


def plain(report: Report) -> str:
    """Writes a report as text of at most 100 columns, names apart.

    Args:
        report: The report.
    """
    parts = [headline(report)]
    parts += [_finding(number, one) for number, one in enumerate(report.findings, 1)]
    if report.remarks:
        parts.append(
            "\n".join(_wrapped(f"- {printable(remark)}", "  ") for remark in report.remarks)
        )
    return "\n\n".join(parts)


def headline(report: Report) -> str:
    """Says in a line what the report is about.

    Args:
        report: The report.
    """
    what = f"{counted(report.steps, 'step')}, {counted(report.parameters, 'parameter')}"
    if not report.findings:
        return f"gradwatch report: {what}. {NOTHING}"
    return f"gradwatch report: {what}, {counted(len(report), 'finding')}."


def evidence(seen: Evidence) -> str:
    """Writes the evidence in a line.

    Args:
        seen: The evidence.
    """
    parts = [f"{name} {value:.4g}" for name, value in seen.numbers.items()]
    if seen.steps:
        word = "step " if len(seen.steps) == 1 else "steps "
        parts.insert(0, word + named([str(step) for step in seen.steps], 5))
    if seen.parameters:
        parts.append(named([printable(name) for name in seen.parameters]))
    if seen.optimizer and seen.optimizer != "none":
        parts.append(printable(seen.optimizer))
    return "; ".join(parts)


def rows(finding: Finding) -> list[tuple[str, str]]:
    """Lists what there is to say of a finding below its title.

    Args:
        finding: The finding.

    Returns:
        Labels and texts.
    """
    pairs = [("seen", evidence(finding.seen)), ("why", finding.why), ("try", finding.advice)]
    return [(label, printable(text)) for label, text in pairs]


def _finding(number: int, finding: Finding) -> str:
    head = f"{number}. [{finding.severity}] {finding.kind}: {printable(finding.title)}"
    below = [_wrapped(f"   {label + ':':<6}{text}", " " * 9) for label, text in rows(finding)]
    return "\n".join([_wrapped(head, "   "), *below])


def _wrapped(text: str, indent: str) -> str:
    return fill(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


STYLES = {"critical": "bold red", "warning": "bold yellow", "note": "bold cyan"}


def coloured(report: Report) -> Group:
    """Makes what ``rich.print`` shows of a report.

    Args:
        report: The report. Its texts are shown as they are: brackets in a name are no markup.
    """
    parts: list[Text | Padding] = [Text(headline(report), style="bold")]
    for number, finding in enumerate(report.findings, 1):
        parts += [Text(), _title(number, finding), *map(_row, rows(finding))]
    if report.remarks:
        parts += [
            Text(),
            *(Text(f"- {printable(remark)}", style="dim") for remark in report.remarks),
        ]
    return Group(*parts)


def _title(number: int, finding: Finding) -> Text:
    head = Text(f"{number}. ")
    head.append(f"{finding.severity} {finding.kind}", style=STYLES[finding.severity])
    return head.append(f"  {printable(finding.title)}")


def _row(pair: tuple[str, str]) -> Padding:
    label, text = pair
    return Padding(Text(f"{label + ':':<6}", style="dim").append(Text(text)), (0, 0, 0, 3))


COLOURS = {"critical": "#c62828", "warning": "#b26a00", "note": "#1565c0"}


def page(report: Report) -> str:
    """Writes a report as a piece of HTML that needs no style sheet and no script.

    Args:
        report: The report. Everything in it is escaped: names of parameters are anybody's.
    """
    parts = [f"<p><b>{escape(headline(report))}</b></p>"]
    parts += map(_finding_html, report.findings)
    if report.remarks:
        entries = "".join(f"<li>{escape(printable(remark))}</li>" for remark in report.remarks)
        parts.append(f'<ul style="opacity:0.7">{entries}</ul>')
    return f'<div style="max-width:60em">{"".join(parts)}</div>'


def _finding_html(finding: Finding) -> str:
    colour = COLOURS[finding.severity]
    badge = f'<b style="color:{colour}">{escape(finding.severity)} {escape(finding.kind)}</b>'
    entries = "".join(
        f'<tr><td style="text-align:left;vertical-align:top;opacity:0.7">{escape(label)}</td>'
        f'<td style="text-align:left">{escape(text)}</td></tr>'
        for label, text in rows(finding)
    )
    return (
        f'<div style="border-left:4px solid {colour};padding-left:0.8em;margin:0.8em 0">'
        f"{badge} {escape(printable(finding.title))}<table>{entries}</table></div>"
    )


@dataclass(frozen=True, slots=True)
class Report:
    """The findings about a run, the heaviest first.

    It is true if anything was found: ``if history.report(): ...``. ``str()`` gives the text,
    ``rich.print()`` the same in colour, and a notebook shows it as HTML.

    Attributes:
        findings: What was found.
        steps: How many steps the run has, of its longest optimizer.
        parameters: How many parameters it has.
        remarks: What could not be looked at, and why.
    """

    findings: tuple[Finding, ...]
    steps: int
    parameters: int
    remarks: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __str__(self) -> str:
        return plain(self)

    def __rich__(self) -> Group:

        return coloured(self)

    def _repr_html_(self) -> str:
        return page(self)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of the findings, each once, the heaviest first."""
        return tuple(dict.fromkeys(finding.kind for finding in self.findings))

    def of_kind(self, kind: str) -> tuple[Finding, ...]:
        """Selects findings.

        Args:
            kind: One of :data:`~gradwatch.report.KINDS`.
        """
        return tuple(finding for finding in self.findings if finding.kind == kind)

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as data that ``json.dumps`` takes; what is not finite is None."""
        return {
            "steps": self.steps,
            "parameters": self.parameters,
            "kinds": list(self.kinds),
            "findings": [
                plain_data(asdict(finding), nonfinite=lambda value: None)
                for finding in self.findings
            ],
            "remarks": list(self.remarks),
        }


def make_report(history: Records, thresholds: Thresholds | None = None, **changes: Any) -> Report:
    """Says what a run means.

    Of the steps it reads the columns that rules look at; of the parameters it reads the norms, and
    the statistics that were taken, of eight ranges of up to 64 steps from first to last, so that a
    million steps take about as long as a thousand.

    Args:
        history: The run, live or loaded.
        thresholds: What is too much, too little and too often; the published ones if left out.
        **changes: Single thresholds by name, ``spike=20.0``.

    Returns:
        The report.

    Raises:
        TypeError: If a threshold is unknown, or no number.
        ValueError: If a threshold is out of bounds.
    """
    limits = _limits(thresholds, changes)
    run = read_run(history, limits)
    findings = () if run is None else _found(run, limits)
    steps = 0 if run is None else len(run)
    return Report(findings, steps, len(history.layout.names), tuple(remarks(run, limits)))


def _limits(thresholds: Thresholds | None, changes: dict[str, Any]) -> Thresholds:
    if thresholds is not None and not isinstance(thresholds, Thresholds):
        raise TypeError(
            f"report(thresholds=) must be gradwatch.Thresholds, got {thresholds!r} of type "
            f"{type(thresholds).__name__}. Write thresholds=Thresholds(spike=20.0)."
        )
    return replace(thresholds or Thresholds(), **changes)


def _found(run: RunData, limits: Thresholds) -> tuple[Finding, ...]:
    rules = RULES if len(run) >= limits.few_steps else ALWAYS
    findings = [finding for rule in rules for finding in rule(run, limits)]
    return tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)))

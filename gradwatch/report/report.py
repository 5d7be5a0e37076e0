"""A report: what the rules found in a run, as text, in color, as HTML and as plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from html import escape
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from gradwatch.checks import described
from gradwatch.pickles import stable_name
from gradwatch.record.columns import Source
from gradwatch.record.folder.files import plain_data
from gradwatch.record.wording import counted, printable
from gradwatch.report.explained import evidence_told, is_found
from gradwatch.report.finding import SEVERITIES, Evidence, Finding, named
from gradwatch.report.rules import ALWAYS, KINDS, RULES
from gradwatch.report.run_data import RunData, first_and_last, read_run
from gradwatch.report.thresholds import Thresholds

if TYPE_CHECKING:
    from rich.console import Group

WIDTH = 100
STYLES = {"critical": "bold red", "warning": "bold yellow", "note": "bold cyan"}
BAD_GRADIENTS = ("nan", "inf", "overflow")
COLORS = {"critical": "#c62828", "warning": "#b26a00", "note": "#1565c0"}

UNKNOWN_THRESHOLD = "report() got a limit {name!r}, which is none of: {known}."
NO_THRESHOLDS = (
    "report(thresholds=) must be gradwatch.Thresholds, got {value}. "
    "Write thresholds=gradwatch.Thresholds(spike=20.0)."
)

EMPTY = "There is no step in this run yet."
FEW = (
    "Few steps ({count}; most rules need {few}), so only mistakes of the loop, NaN and Inf, thrown "
    "away and missing gradients, loss scales, skipped steps, exploding norms and the lower end of "
    "float16 were checked."
)
NOT_FROM_START = (
    "The first steps (up to step {step}) are missing, so norms were compared with those of later "
    "steps. To keep every step: watch(..., run_dir=...), or gradwatch run --run-dir."
)
OTHER_EVENTS = "There were other events ({kinds}); history.events() lists them."
NOT_TAKEN = {
    "update_ratio": (
        "The size of updates relative to the weights was not recorded. To record it: "
        'watch(..., statistics=("update_ratio",), every=10), or gradwatch run --statistics '
        "update_ratio --every 10."
    ),
    "zeros": (
        "Dead units within a layer were not recorded. To record them: "
        'watch(..., statistics=("zeros",), every=10), or gradwatch run --statistics zeros '
        "--every 10."
    ),
}


@stable_name
@dataclass(frozen=True, slots=True)
class Report:
    """The findings about a run, most serious first.

    A report is true if it has findings: ``if history.report(): ...``. ``str()`` gives the text,
    ``rich.print()`` prints it in color, and a notebook shows it as HTML.

    Attributes:
        findings: Most serious first; within a severity, causes come before their effects. A NaN,
            Inf or overflow that was explained to its cause comes before all others.
        steps: Number of steps of the optimizer with the most steps, those included that are missing
            from memory.
        parameters: Number of parameters of the model.
        remarks: What could not be checked, and why.
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

    def __repr__(self) -> str:
        kinds = f": {', '.join(self.kinds)}" if self.findings else ""
        return (
            f"Report({counted(self.steps, 'step')}, {counted(self.parameters, 'parameter')}, "
            f"{counted(len(self), 'finding')}{kinds})"
        )

    def __str__(self) -> str:
        return _as_text(self)

    def __rich__(self) -> Group:
        return _in_color(self)

    def _repr_html_(self) -> str:
        return _as_html(self)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of the findings, each once, most serious first."""
        return tuple(dict.fromkeys(finding.kind for finding in self.findings))

    def of_kind(self, kind: str) -> tuple[Finding, ...]:
        """Returns the findings of one kind.

        Args:
            kind: One of :data:`~gradwatch.report.KINDS`.
        """
        return tuple(finding for finding in self.findings if finding.kind == kind)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as data for ``json.dumps``; NaN and infinities become None."""
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


def make_report(source: Source, thresholds: Thresholds | None = None, **changes: Any) -> Report:
    """Applies the rules to a run; see :meth:`gradwatch.History.report`.

    Args:
        source: A live run or a run folder.
        thresholds: The limits of the rules; None for the defaults.
        **changes: Limits to change, by name: ``spike=20.0``.

    Raises:
        TypeError: If a threshold is unknown, or not a number.
        ValueError: If a threshold is out of bounds.
    """
    if thresholds is not None and not isinstance(thresholds, Thresholds):
        raise TypeError(NO_THRESHOLDS.format(value=described(thresholds)))
    known = [field.name for field in fields(Thresholds)]
    for name in changes:
        if name not in known:
            raise TypeError(UNKNOWN_THRESHOLD.format(name=name, known=", ".join(known)))
    limits = replace(thresholds or Thresholds(), **changes)
    parameters = len(source.layout().names)
    run = read_run(source, limits)
    if run is None:
        return Report((), 0, parameters, (EMPTY,))
    # Memory holds the newest steps only: the others were taken as well.
    last = first_and_last(run.optimizers)[1] if len(run) else 0
    steps = max(len(run), last)
    return Report(_findings(run, limits), steps, parameters, tuple(_remarks(run, limits)))


def _findings(run: RunData, limits: Thresholds) -> tuple[Finding, ...]:
    rules = RULES if len(run) >= limits.few_steps else ALWAYS
    findings = [finding for rule in rules for finding in rule(run, limits)]

    def place(finding: Finding) -> tuple[bool, int]:
        # What is known to the line of code comes first, whatever followed from it.
        known = finding.kind in BAD_GRADIENTS and is_found(finding.explanation)
        return not known, SEVERITIES.index(finding.severity)

    # sorted() is stable: within a severity the rules keep their order, causes first.
    return tuple(sorted(findings, key=place))


def _remarks(run: RunData, limits: Thresholds) -> Iterator[str]:
    """Yields a sentence for everything that could not be checked, and for events of other kinds."""
    if not len(run):
        yield EMPTY
        return
    if len(run) < limits.few_steps:
        yield FEW.format(count=len(run), few=limits.few_steps)
    first, _ = first_and_last(run.optimizers)
    if first > 1:
        yield NOT_FROM_START.format(step=first - 1)
    for name, remark in NOT_TAKEN.items():
        # The column may exist and be NaN throughout: with ``every=``, no sampled step may have it.
        if not np.isfinite(run.sample.columns.get(name, np.nan)).any():
            yield remark
    # Kinds that no rule looks at: nobody shall read "Nothing was found" where something happened.
    others = Counter(one.kind for one in run.events if one.kind not in (*KINDS, "explained"))
    if others:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in others.most_common())
        yield OTHER_EVENTS.format(kinds=kinds)


def _headline(report: Report) -> str:
    what = f"{counted(report.steps, 'step')}, {counted(report.parameters, 'parameter')}"
    if not report.findings:
        return f"gradwatch report: {what}. Nothing was found."
    return f"gradwatch report: {what}, {counted(len(report), 'finding')}."


def _rows(finding: Finding) -> list[tuple[str, str]]:
    """Returns ``(label, text)`` of the lines below the title of a finding."""
    seen = _evidence(finding.seen)
    if finding.explanation is not None:
        seen = "; ".join(filter(None, (evidence_told(finding.explanation), seen)))
    pairs = [("seen", seen), ("why", finding.why), ("try", finding.advice)]
    return [(label, printable(text)) for label, text in pairs]


def _evidence(seen: Evidence) -> str:
    parts = [f"{name} {value:.4g}" for name, value in seen.numbers.items()]
    if seen.steps:
        word = "step " if len(seen.steps) == 1 else "steps "
        parts.insert(0, word + named([str(step) for step in seen.steps], 5))
    if seen.parameters:
        # Escape each name by itself: how a name is shown must not depend on the one before it.
        parts.append(named([printable(name) for name in seen.parameters]))
    if seen.optimizer and seen.optimizer != "none":
        parts.append(printable(seen.optimizer))
    return "; ".join(parts)


def _as_text(report: Report) -> str:
    """Formats a report as text, at most 100 columns wide unless a name is longer."""
    parts = [_headline(report)]
    for number, finding in enumerate(report.findings, 1):
        head = f"{number}. [{finding.severity}] {finding.kind}: {printable(finding.title)}"
        below = [_wrapped(f"   {label + ':':<6}{text}", " " * 9) for label, text in _rows(finding)]
        parts.append("\n".join([_wrapped(head, "   "), *below]))
    if report.remarks:
        remarks = [_wrapped(f"- {printable(remark)}", "  ") for remark in report.remarks]
        parts.append("\n".join(remarks))
    return "\n\n".join(parts)


def _wrapped(text: str, indent: str) -> str:
    # Never break a name: users search for it and copy it.
    return fill(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _in_color(report: Report) -> Group:
    """Formats a report for ``rich.print``."""
    # Import here: rich comes with gradwatch[runs], and a report must work without any extra.
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    # Text, not str: rich reads brackets in a str as markup, and names may hold any characters.
    parts: list[Text | Padding] = [Text(_headline(report), style="bold")]
    for number, finding in enumerate(report.findings, 1):
        head = Text(f"{number}. ")
        head.append(f"{finding.severity} {finding.kind}", style=STYLES[finding.severity])
        parts += [Text(), head.append(f"  {printable(finding.title)}")]
        for label, text in _rows(finding):
            row = Text(f"{label + ':':<6}", style="dim").append(Text(text))
            parts.append(Padding(row, (0, 0, 0, 3)))
    if report.remarks:
        remarks = [Text(f"- {printable(remark)}", style="dim") for remark in report.remarks]
        parts += [Text(), *remarks]
    return Group(*parts)


def _as_html(report: Report) -> str:
    """Formats a report as an HTML fragment that needs no style sheet and no script."""
    parts = [f"<p><b>{escape(_headline(report))}</b></p>"]
    parts += map(_finding_html, report.findings)
    if report.remarks:
        entries = "".join(f"<li>{escape(printable(remark))}</li>" for remark in report.remarks)
        parts.append(f'<ul style="opacity:0.7">{entries}</ul>')
    return f'<div style="max-width:60em">{"".join(parts)}</div>'


def _finding_html(finding: Finding) -> str:
    color = COLORS[finding.severity]
    badge = f'<b style="color:{color}">{escape(finding.severity)} {escape(finding.kind)}</b>'
    # Opacity instead of gray: a notebook may have a dark theme.
    entries = "".join(
        f'<tr><td style="text-align:left;vertical-align:top;opacity:0.7">{escape(label)}</td>'
        f'<td style="text-align:left">{escape(text)}</td></tr>'
        for label, text in _rows(finding)
    )
    return (
        f'<div style="border-left:4px solid {color};padding-left:0.8em;margin:0.8em 0">'
        f"{badge} {escape(printable(finding.title))}<table>{entries}</table></div>"
    )

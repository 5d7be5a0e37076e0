"""The text of a report, for any terminal or log."""

from __future__ import annotations

from textwrap import fill
from typing import TYPE_CHECKING

from gradwatch.explain.report.finding import Finding, Seen
from gradwatch.explain.report.wording import counted, named, printable

if TYPE_CHECKING:
    from gradwatch.explain.report.report import Report

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


def evidence(seen: Seen) -> str:
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

"""The text of a report in colour; rich is loaded here only, and only by those who have it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.padding import Padding
from rich.text import Text

from gradwatch.explain.report.finding import Finding
from gradwatch.explain.report.text import headline, rows
from gradwatch.explain.report.wording import printable

if TYPE_CHECKING:
    from gradwatch.explain.report.report import Report

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

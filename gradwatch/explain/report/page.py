"""The HTML of a report, for notebooks."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from gradwatch.explain.report.finding import Finding
from gradwatch.explain.report.text import headline, rows
from gradwatch.explain.report.wording import printable

if TYPE_CHECKING:
    from gradwatch.explain.report.report import Report

COLOURS = {"critical": "#c62828", "warning": "#b26a00", "note": "#1565c0"}


def page(report: Report) -> str:
    """Writes a report as a piece of HTML that needs no style sheet and no script.

    Args:
        report: The report. Everything in it is escaped: names of parameters are anybody's.
    """
    parts = [f"<p><b>{escape(headline(report))}</b></p>"]
    parts += map(_finding, report.findings)
    if report.remarks:
        entries = "".join(f"<li>{escape(printable(remark))}</li>" for remark in report.remarks)
        parts.append(f'<ul style="opacity:0.7">{entries}</ul>')
    return f'<div style="max-width:60em">{"".join(parts)}</div>'


def _finding(finding: Finding) -> str:
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

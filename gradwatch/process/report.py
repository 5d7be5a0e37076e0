"""The reports of all models of a process, as one text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from gradwatch.record.wording import printable

if TYPE_CHECKING:
    from gradwatch.report.report import Report


class ProcessReport(Mapping[str, "Report"]):
    """What is wrong with each model that was trained: a mapping from labels to reports.

    ``str()`` gives the text, and a notebook shows it as HTML. With one model it is that model's
    report alone.
    """

    def __init__(self, reports: Mapping[str, Report], remark: str = "") -> None:
        """Holds reports by the label of the model.

        ``remark`` is the text where there is no report: why nothing was watched.
        """
        self._reports = dict(reports)
        self._remark = remark

    def __getitem__(self, label: str) -> Report:
        return self._reports[label]

    def __iter__(self) -> Iterator[str]:
        return iter(self._reports)

    def __len__(self) -> int:
        return len(self._reports)

    def __repr__(self) -> str:
        return f"ProcessReport({', '.join(self._reports) or 'nothing was watched'})"

    def __str__(self) -> str:
        if not self._reports:
            return self._remark
        if len(self._reports) == 1:
            return str(next(iter(self._reports.values())))
        parts = (f"== {printable(name)}\n{report}" for name, report in self._reports.items())
        return "\n".join(parts)

    def _repr_html_(self) -> str:
        from html import escape  # few programs show it

        if not self._reports:
            return f"<p>{escape(self._remark)}</p>"
        alone = len(self._reports) == 1
        return "\n".join(
            ("" if alone else f"<h3>{escape(printable(name))}</h3>") + report._repr_html_()
            for name, report in self._reports.items()
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the reports as data for ``json.dumps``, by label."""
        return {name: report.to_dict() for name, report in self._reports.items()}

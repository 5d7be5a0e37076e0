"""Report: what a run means, in findings; as text, HTML and plain data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gradwatch.explain.report.finding import Finding
from gradwatch.explain.report.page import page
from gradwatch.explain.report.text import plain

if TYPE_CHECKING:
    from rich.console import Group


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
        from gradwatch.explain.report.coloured import coloured

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
            kind: One of :data:`~gradwatch.explain.report.KINDS`.
        """
        return tuple(finding for finding in self.findings if finding.kind == kind)

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as data that ``json.dumps`` takes; what is not finite is None."""
        return {
            "steps": self.steps,
            "parameters": self.parameters,
            "kinds": list(self.kinds),
            "findings": [_jsonable(asdict(finding)) for finding in self.findings],
            "remarks": list(self.remarks),
        }


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

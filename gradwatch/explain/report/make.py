"""make_report(): reads a run, asks every rule, and puts what they found in order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gradwatch.explain.report.finding import SEVERITIES, Finding
from gradwatch.explain.report.records import Records, Run, read_run
from gradwatch.explain.report.remarks import remarks
from gradwatch.explain.report.report import Report
from gradwatch.explain.report.rules import ALWAYS, RULES
from gradwatch.explain.report.thresholds import Thresholds


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


def _found(run: Run, limits: Thresholds) -> tuple[Finding, ...]:
    rules = RULES if len(run) >= limits.few_steps else ALWAYS
    findings = [finding for rule in rules for finding in rule(run, limits)]
    return tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)))

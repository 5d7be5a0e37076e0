"""Report: findings about a run, each with its evidence, why it matters and what to try."""

from __future__ import annotations

from gradwatch.report.finding import Evidence, Finding, Severity
from gradwatch.report.report import Report, make_report
from gradwatch.report.rules import KINDS
from gradwatch.report.thresholds import Thresholds

__all__ = ["KINDS", "Evidence", "Finding", "Report", "Severity", "Thresholds", "make_report"]

"""Report: findings about a run, each with its evidence, why it matters and what to try."""

from gradwatch.explain.report.finding import Finding, Seen, Severity
from gradwatch.explain.report.make import make_report
from gradwatch.explain.report.report import Report
from gradwatch.explain.report.rules import KINDS
from gradwatch.explain.report.thresholds import Thresholds

__all__ = ["KINDS", "Finding", "Report", "Seen", "Severity", "Thresholds", "make_report"]

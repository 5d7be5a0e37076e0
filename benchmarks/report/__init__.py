"""Measures how often the report is wrong: ``python -m benchmarks.report``."""

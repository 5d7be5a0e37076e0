"""Measures how the cost of gradwatch grows: ``python -m benchmarks.scaling``."""

"""Measures what gradwatch and others add to a training step: ``python -m benchmarks.overhead``."""

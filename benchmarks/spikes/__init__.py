"""Measures what gradient spikes do under each policy: ``python -m benchmarks.spikes``."""

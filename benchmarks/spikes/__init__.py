"""What gradient spikes do to a training under each policy: ``python -m benchmarks.spikes``."""

"""What gradwatch and other tools add to a training step: ``python -m benchmarks.overhead``."""

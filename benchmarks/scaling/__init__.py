"""How the cost of gradwatch grows: ``python -m benchmarks.scaling``."""

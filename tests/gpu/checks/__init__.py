"""The checks, a file for each subject; importing this registers all of them, in the order of the run."""

from tests.gpu.checks import (  # isort: skip
    norms,
    training,
    waits,
    late,
    precision,
    accumulation,
    devices,
    timing,
    memory,
    streams,
    graphs,
    compiled,
    lightning,
    failures,
)

__all__ = [
    "accumulation",
    "compiled",
    "devices",
    "failures",
    "graphs",
    "late",
    "lightning",
    "memory",
    "norms",
    "precision",
    "streams",
    "timing",
    "training",
    "waits",
]

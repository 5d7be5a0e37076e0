"""Poisoned: buffers, such as running statistics, that hold a NaN or Inf."""

from __future__ import annotations

from collections.abc import Iterator

from gradwatch.report.finding import Evidence, Finding
from gradwatch.report.run_data import RunData
from gradwatch.report.thresholds import Thresholds

WHY = (
    "A forward writes into buffers before anybody knows what its gradients will be. A moving mean "
    "that has taken in a NaN stays NaN, whatever batches follow: training goes on with the "
    "statistics of each batch, and eval() uses the spoiled ones."
)


def poisoned(run: RunData, limits: Thresholds) -> Iterator[Finding]:
    """Repeats every event of kind ``poisoned``; each was told once in the run."""
    for event in run.events:
        if event.kind != "poisoned":
            continue
        # The message says first what was seen, and last what to do.
        *seen, advice = event.message.split(". ")
        numbers = {"buffers": float(event.value)}
        where = Evidence((event.step,), (), numbers, event.optimizer)
        yield Finding("poisoned", "critical", f"{'. '.join(seen)}.", where, WHY, advice)

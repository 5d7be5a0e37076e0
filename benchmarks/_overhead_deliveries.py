"""Deliveries: what writing 64 steps down, and handing them to the sinks, takes."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from _overhead_ways import LIMITS, sink_options

import gradwatch
from gradwatch.record import hub

REAL_SECONDS = hub.FLUSH_SECONDS  # as users have it; benchmarks stretch it


@cache  # the settings of one workload have the same parameters
def delivery_seconds(names: tuple[str, ...], sinks: tuple[str, ...], deliveries: int) -> float:
    """Measures what a delivery adds to the step that it falls into.

    A delivery knows a parameter by its name and its norms only, so the parameters are of one
    element each here.

    Args:
        names: Names of the parameters.
        sinks: Which sinks get it; none where the records just enter the buffer.
        deliveries: How many to take the mean of: now and then one merges what earlier ones wrote.

    Returns:
        Seconds for a batch of 64 steps, the background thread's work included.
    """
    model = {name: torch.zeros(1, requires_grad=True) for name in names}
    tensors = list(model.values())
    optimizer = torch.optim.SGD(tensors, lr=0.0)
    limit = LIMITS["every step clipped"]
    ordinary, delivering = [], []
    with tempfile.TemporaryDirectory() as folder:
        options = sink_options(sinks, folder)
        with endless_deliveries(), gradwatch.watch(model, optimizer, clip=limit, **options):
            # The first one opens the files, once in a run.
            for step in range(1, (deliveries + 1) * hub.FLUSH_STEPS + 1):
                optimizer.zero_grad()
                (torch.cat(tensors) * torch.randn(len(tensors))).sum().backward()
                start = time.perf_counter()
                optimizer.step()
                seconds = time.perf_counter() - start
                due = step % hub.FLUSH_STEPS == 0
                (delivering if due else ordinary).append(seconds)
    return max(0.0, statistics.fmean(delivering[1:]) - statistics.median(ordinary))


@contextmanager
def endless_deliveries() -> Iterator[None]:
    """Keeps the clock from starting a delivery inside of a turn: they are timed by themselves."""
    before, hub.FLUSH_SECONDS = hub.FLUSH_SECONDS, math.inf
    try:
        yield
    finally:
        hub.FLUSH_SECONDS = before


def steps_per_delivery(step_s: float) -> float:
    """Returns how many steps share a delivery: 64, or those of 5 seconds.

    Args:
        step_s: Seconds of a step.
    """
    return min(float(hub.FLUSH_STEPS), max(1.0, REAL_SECONDS / step_s))

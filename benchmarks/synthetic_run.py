"""A synthetic run of any length, in the batches that gradwatch passes to its sinks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from gradwatch.record.records import Layout, RecordBatch, StepRecord, clipped_by

BATCH_STEPS = 64


def batches(
    steps: int,
    parameters: int,
    *,
    levels: np.ndarray | float = 0.0,
    max_norm: float = 20.0,
    nan_every: int | None = None,
) -> Iterator[RecordBatch]:
    """Generates a run: float32 norms that follow a random walk and are clipped now and then.

    Args:
        steps: Number of steps.
        parameters: Number of parameters.
        levels: Logarithms of the norms at the start, one for all or one for each parameter.
        max_norm: Limit of the clip on the total norm.
        nan_every: In one of this many batches, half of the parameters have a NaN; None for never.
    """
    names = tuple(f"encoder.layers.{i // 12}.block_{i % 12}.weight" for i in range(parameters))
    layout = Layout(names, tuple(name.rpartition(".")[0] for name in names))
    rng = np.random.default_rng(0)
    level = np.zeros(parameters) + levels
    for number, first in enumerate(range(1, steps + 1, BATCH_STEPS)):
        count = min(BATCH_STEPS, steps + 1 - first)
        level += rng.normal(0, 0.05, parameters)
        level *= 0.999
        norms = np.exp(level + rng.normal(0, 0.2, (count, parameters))).astype(np.float32)
        if nan_every is not None and number % nan_every == nan_every // 2:
            norms[0, parameters // 2 :] = np.nan
        records = [_record(step, row, max_norm) for step, row in enumerate(norms, first)]
        coefficients = np.array([[record.clip_coef] for record in records])
        yield RecordBatch(layout, records, norms, clipped_by(norms, coefficients))


def _record(step: int, row: np.ndarray, max_norm: float) -> StepRecord:
    total = float(np.linalg.norm(row))
    coefficient = min(1.0, max_norm / total)
    return StepRecord(
        step=step,
        optimizer="AdamW",
        time_s=step * 0.0197 + (0.0 if math.isnan(total) else total * 1e-4),
        grad_norm=total,
        grad_norm_clipped=coefficient * total,
        clip_coef=coefficient,
        clip_threshold=max_norm,
        clipped=coefficient < 1,
        nonfinite_parameters=int((~np.isfinite(row)).sum()),
        loss=total / 7,
        lr=1e-3,
        global_step=step,
    )

"""NaN and Inf: where they began, and what was before them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.report.finding import Evidence, Finding, Severity
from gradwatch.report.run_data import OptimizerArrays, RunData, counted, first_steps
from gradwatch.report.thresholds import Thresholds

if TYPE_CHECKING:
    import pandas as pd


WORDS = {"nan": "NaN", "inf": "Inf", "overflow": "overflow of the norm"}
WHY = (
    "A NaN or Inf that reaches the weights stays there: every later step of the parameter is lost. "
    "{fate}"
)
LOST = "{count} of these steps were applied, so the weights are spoilt from step {step} on."
SPARED = "None of these steps was applied: the weights were spared."
RISING = (
    "The norm rose from {low:.3g} to {high:.3g} before: the training diverged. Lower the learning "
    'rate, by ten to begin with, warm it up, or clip: watch(..., clip="auto").'
)
SCALED = (
    "The loss was multiplied by {scale:,.0f}: the scaled gradient is beyond float16. Let the "
    "GradScaler leave such steps out (scaler.step, scaler.update), or start it with a lower scale."
)
FROM_START = (
    "It was there in the first step: look at the inputs, the initial weights and functions at "
    "their edge, such as log(0), sqrt(0) or 0/0, in and after {module}."
)
SUDDEN = (
    "The norms before were ordinary: a single bad batch, or a function at its edge (log(0), "
    "sqrt(0), 0/0) in or after {module}. Look at the batch of micro-batch {micro_batch} of step "
    "{step}{else_skip}."
)
SKIP = '; watch(..., on_nonfinite="skip") leaves such steps out'


def nonfinite(run: RunData, limits: Thresholds) -> Iterator[Finding]:
    """Finds gradients with a NaN or Inf, and norms beyond float32.

    Steps that a ``GradScaler`` left out are its daily work, and left to the rule on loss scales.

    Args:
        run: The run.
        limits: ``rise``.
    """
    for track in run.tracks:
        bad = track.bad
        if bad.any():
            yield _finding(run, track, limits)


def _finding(run: RunData, track: OptimizerArrays, limits: Thresholds) -> Finding:
    steps = track.step[track.bad]
    event = _first_event(run.events_of(track, tuple(WORDS)), steps)
    kind = "nan" if event is None else str(event["kind"])
    name = "" if event is None else str(event["parameter"])
    place = f", first in {name}{_place(event)}" if event is not None and name else ""
    numbers = {"steps": float(len(steps)), "applied": float((track.bad & track.applied).sum())}
    if event is not None:
        numbers |= {key: float(event[key]) for key in ("micro_batch", "rank")}
        numbers |= {key: float(event[key]) for key in ("nan_count", "inf_count") if event[key] >= 0}
    return Finding(
        kind,
        _severity(track),
        f"{WORDS[kind]} in {counted(len(steps), 'step')}, from step {steps[0]} on{place}.",
        Evidence(first_steps(steps), (name,) if name else (), numbers, track.optimizer),
        WHY.format(fate=_fate(track)),
        _advice(track, event, limits),
    )


def _first_event(events: pd.DataFrame, steps: np.ndarray) -> pd.Series | None:
    mine = events[events["step"].isin(steps[:1])]
    return mine.iloc[0] if len(mine) else None


def _place(event: pd.Series) -> str:
    batch = int(event["micro_batch"])
    rank = int(event["rank"])
    return (f", micro-batch {batch}" if batch else "") + (f", rank {rank}" if rank else "")


def _severity(track: OptimizerArrays) -> Severity:
    return "critical" if (track.bad & track.applied).any() else "warning"


def _fate(track: OptimizerArrays) -> str:
    lost = track.bad & track.applied
    if not lost.any():
        return SPARED
    return LOST.format(count=int(lost.sum()), step=int(track.step[lost][0]))


def _advice(track: OptimizerArrays, event: pd.Series | None, limits: Thresholds) -> str:
    place = int(np.flatnonzero(track.bad)[0])
    before = track["grad_norm"][:place]
    before = before[np.isfinite(before)]
    facts = {
        "module": "the model" if event is None else str(event["module"]) or "the model",
        "micro_batch": 1 if event is None else int(event["micro_batch"]) or 1,
        "step": int(track.step[place]),
        "else_skip": SKIP if (track.bad & track.applied).any() else "",
    }
    scale = float(track["loss_scale"][place])
    if scale > 1:
        return SCALED.format(scale=scale)
    if len(before) and _rise(before) >= limits.rise:
        return RISING.format(low=_usual(before), high=before[-5:].max())
    if not len(before):
        return FROM_START.format(**facts)
    return SUDDEN.format(**facts)


def _usual(norms: np.ndarray) -> float:
    """Takes the norm from which a rise began: the first one, or the usual of the run if lower."""
    return float(min(norms[0], np.median(norms[:-5]) if len(norms) > 10 else norms[0]))


def _rise(norms: np.ndarray) -> float:
    return float(norms[-5:].max() / max(_usual(norms), np.finfo(np.float64).tiny))

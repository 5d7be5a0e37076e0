"""Skipped: steps that were not applied."""

from __future__ import annotations

from collections.abc import Iterator

from gradwatch.record.columns import Array
from gradwatch.report.finding import Evidence, Finding, counted, first_steps
from gradwatch.report.run_data import OptimizerArrays, RunData
from gradwatch.report.thresholds import Thresholds

WHY = "A step that is left out costs its batch, and moves schedules of the learning rate apart."
ADVICE = (
    "Look at the batches of these steps, and at what this report says of NaN and of spikes. Where "
    "many in a row are left out, the cause is no single batch: lower the learning rate."
)
SCALER = (
    "The GradScaler has met gradients beyond float16 in these steps. Some at the start, and one "
    "now and then, are its way to find the scale; so many mean that the model's gradients have no "
    "place in float16: use bfloat16, or keep the layers with the largest gradients in float32."
)


def skipped(run: RunData, limits: Thresholds) -> Iterator[Finding]:
    """Finds steps that were left out by gradwatch, or more than usual by a scaler."""
    for steps in run.optimizers:
        # A scaler leaves steps out by design, while it looks for its scale: those have room of
        # their own before they count.
        by_us = ~steps.applied & ~steps.by_scaler
        if by_us.any():
            often = by_us.mean() > limits.skipped
            yield _finding(steps, steps.step[by_us], often, ADVICE, limits)
        allowed = limits.scaler_skips + limits.skipped * len(steps)
        if steps.by_scaler.sum() > allowed:
            yield _finding(steps, steps.step[steps.by_scaler], True, SCALER, limits)


def _finding(
    steps: OptimizerArrays, skipped: Array, often: bool, advice: str, limits: Thresholds
) -> Finding:
    share = len(skipped) / len(steps)
    title = (
        f"{counted(len(skipped), 'step')} of {len(steps):,} ({share:.1%}) were not applied, the "
        f"first at step {skipped[0]}."
    )
    numbers = {"skipped": float(len(skipped)), "share": share, "limit": limits.skipped}
    seen = Evidence(first_steps(skipped), (), numbers, steps.optimizer)
    return Finding("skipped", "warning" if often else "note", title, seen, WHY, advice)

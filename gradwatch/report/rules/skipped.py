"""Skipped: steps that were not applied."""

from __future__ import annotations

from collections.abc import Iterator

from gradwatch.record.columns import Array
from gradwatch.record.explanation import Explanation
from gradwatch.record.wording import counted
from gradwatch.report.finding import Evidence, Finding, first_steps
from gradwatch.report.run_data import OptimizerArrays, RunData
from gradwatch.report.thresholds import Thresholds

WHY = (
    "A skipped step wastes its batch, and a learning rate schedule that advances at every step "
    "gets ahead of the optimizer."
)
ADVICE = (
    "Check the batches of these steps, and what this report says about NaN and spikes. If many "
    "steps in a row are skipped, a single batch is not the cause: lower the learning rate."
)
SCALER = (
    "The GradScaler found gradients beyond float16 in these steps. It finds its scale by skipping "
    "a few steps at the start and one now and then; this many mean that the model's gradients do "
    "not fit into float16: use bfloat16, or keep the layers with the largest gradients in float32."
)


def skipped(run: RunData, limits: Thresholds) -> Iterator[Finding]:
    """Finds steps that gradwatch skipped, and steps that a scaler skipped more than usual."""
    for steps in run.optimizers:
        # A scaler skips steps by design while it searches for its scale: it has an allowance.
        by_us = ~steps.applied & ~steps.by_scaler
        if by_us.any():
            often = by_us.mean() > limits.skipped
            # What a NaN came from is in a finding of its own.
            spikes = run.explanations_of(steps.optimizer, ("spike",))
            told = next((one for one in spikes if one.step in steps.step[by_us]), None)
            yield _finding(steps, steps.step[by_us], often, ADVICE, limits, told)
        allowed = limits.scaler_skips + limits.skipped * len(steps)
        if steps.by_scaler.sum() > allowed:
            yield _finding(steps, steps.step[steps.by_scaler], True, SCALER, limits)


def _finding(
    steps: OptimizerArrays,
    skipped: Array,
    often: bool,
    advice: str,
    limits: Thresholds,
    told: Explanation | None = None,
) -> Finding:
    share = len(skipped) / len(steps)
    title = (
        f"{counted(len(skipped), 'step')} of {len(steps):,} ({share:.1%}) "
        f"{'was' if len(skipped) == 1 else 'were'} not applied, the first at step {skipped[0]}."
    )
    numbers = {"skipped": float(len(skipped)), "share": share, "limit": limits.skipped}
    names = () if told is None else tuple(one.name for one in told.largest_parameters)
    seen = Evidence(first_steps(skipped), names, numbers, steps.optimizer)
    return Finding("skipped", "warning" if often else "note", title, seen, WHY, advice, told)

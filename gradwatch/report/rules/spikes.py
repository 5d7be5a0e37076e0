"""Spikes: single steps whose norm is far above those around them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from gradwatch.record.columns import Array
from gradwatch.record.explanation import Explanation
from gradwatch.record.wording import counted
from gradwatch.report.finding import Evidence, Finding, Severity, first_steps
from gradwatch.report.run_data import OptimizerArrays, RunData
from gradwatch.report.thresholds import Thresholds

_BLOCK = 32
_MOST = 10

WHY = (
    "One step in a wrong direction can undo hundreds of good ones, and Adam's second moment "
    "remembers it for about a thousand. {clip}"
)
UNCLIPPED = "{count} of them reached the weights unclipped."
UNKNOWN = "Whether a clip acted on them could not be seen."
CLIPPED = "All of them were clipped or skipped."
ADVICE = (
    'watch(..., clip="auto") brings such steps down to the usual norm, and skip_spikes="auto" '
    "skips them. Check the batches of these steps for wrong labels and empty or overlong examples."
)


def spikes(run: RunData, limits: Thresholds) -> Iterator[Finding]:
    """Finds steps whose norm is far above the usual norm around them."""
    for steps in run.optimizers:
        # In logarithms, where the norms of a healthy run spread evenly; norms of 0 are left out.
        rows = np.flatnonzero(np.isfinite(steps["grad_norm"]))
        norms = steps["grad_norm"][rows].astype(float)
        rows, norms = rows[norms > 0], np.log(norms[norms > 0])
        if len(rows) < 2 * _BLOCK:
            continue
        usual, deviation = surroundings(norms)
        above = norms - usual
        out = np.flatnonzero(above > np.maximum(math.log(limits.spike), limits.spike_z * deviation))
        if len(out):
            told = run.explanations_of(steps.optimizer, ("spike",))
            yield _finding(steps, rows[out], np.exp(above[out]), limits, told)


def surroundings(logs: Array) -> tuple[Array, Array]:
    """Returns what is usual around each step.

    Steps are grouped in blocks of 32. The usual value is the largest of three medians: of the
    step's own block, the block before and the block after. So the first steps of a rise and the
    last ones before a fall are not spikes. The deviation, 1.4826 times the median absolute
    deviation, is the largest of three in the same way.

    Args:
        logs: float64 ``[steps]``, at least 32: logarithms of norms.

    Returns:
        The usual logarithm and its deviation, float64 ``[steps]`` each.
    """
    # In blocks: a running median would sort a window for each of a million steps.
    whole = len(logs) // _BLOCK
    blocks = logs[: whole * _BLOCK].reshape(whole, _BLOCK)
    medians = np.median(blocks, axis=1)
    deviations = 1.4826 * np.median(np.abs(blocks - medians[:, None]), axis=1)
    # The remaining steps at the end belong to the last whole block.
    block = np.minimum(np.arange(len(logs)) // _BLOCK, whole - 1)
    return _largest_around(medians)[block], _largest_around(deviations)[block]


def _largest_around(values: Array) -> Array:
    padded = np.pad(values, 1, mode="edge")
    largest: Array = np.maximum(np.maximum(padded[:-2], padded[1:-1]), padded[2:])
    return largest


def _finding(
    steps: OptimizerArrays,
    rows: Array,
    sizes: Array,
    limits: Thresholds,
    explanations: Sequence[Explanation],
) -> Finding:
    worst = np.argsort(-sizes, kind="stable")[:_MOST]
    free = int((steps.applied & (steps["clipped"] == 0))[rows].sum())
    unknown = int((steps.applied & np.isnan(steps["clipped"]))[rows].sum())
    step = int(steps.step[rows[worst[0]]])
    title = (
        f"{counted(len(rows), 'spike')} of the gradient norm, the largest in step {step}: "
        f"{sizes[worst[0]]:.3g} times the usual norm."
    )
    numbers = {
        "spikes": float(len(rows)),
        "largest": float(sizes[worst[0]]),
        "applied_unclipped": float(free),
        "limit": limits.spike,
    }
    fate = UNCLIPPED.format(count=free) if free else UNKNOWN if unknown else CLIPPED
    why = WHY.format(clip=fate)
    # Of those that were explained, the one that was the largest.
    by_step = {one.step: one for one in reversed(explanations)}
    worst_steps = first_steps(steps.step[rows[worst]])
    told = next((by_step[one] for one in worst_steps if one in by_step), None)
    names = () if told is None else tuple(one.name for one in told.largest_parameters)
    seen = Evidence(worst_steps, names, numbers, steps.optimizer)
    severity: Severity = "warning" if free or unknown else "note"
    return Finding("spike", severity, title, seen, why, ADVICE, told)

"""Events of the accumulation: a window of another length, a window that was lost, memory."""

from __future__ import annotations

import math

from gradwatch.control.noise_scale import NoiseScale
from gradwatch.observe.ranks import rank
from gradwatch.record.event import Event

CHANGED = "From step {step} on a step has {new} micro-batches instead of {old}{why}."
WHY = ": the noise scale is {noise} \N{PLUS-MINUS SIGN} {stderr} at a batch of {batch}"
DROPPED = (
    "{count} micro-batch(es) of weight {weight:g} were in the window of step {step} when its state "
    "was saved. Their gradients are not in a checkpoint: the window begins anew, and they are lost."
)
OUT_OF_MEMORY = (
    "A micro-batch of {old} examples did not fit into memory in step {step}. The batch was run "
    "again in micro-batches of at most {new}, and later ones will be."
)


def changed_event(step: int, old: int, new: int, noise: NoiseScale | None) -> Event:
    """Tells that windows have another number of micro-batches from now on.

    Args:
        step: The first step that has it.
        old: The number so far.
        new: The number from now on.
        noise: What decided; None where it was a schedule.
    """
    why = ""
    if noise is not None and math.isfinite(noise.b_simple):
        sizes = {"noise": noise.b_simple, "stderr": noise.stderr, "batch": noise.batch}
        why = WHY.format(**{name: _short(size) for name, size in sizes.items()})
    text = CHANGED.format(step=step, new=new, old=old, why=why)
    return Event(step, 0, "accumulate", "", "", float(new), rank(), text)


def dropped_event(step: int, count: int, weight: float) -> Event:
    """Tells that a run was resumed in the middle of a window.

    Args:
        step: The step that the window was for.
        count: Micro-batches that had come.
        weight: Sum of their weights.
    """
    text = DROPPED.format(step=step, count=count, weight=weight)
    return Event(step, 0, "dropped", "", "", float(count), rank(), text)


def out_of_memory_event(step: int, old: int, new: int) -> Event:
    """Tells that micro-batches are smaller from now on.

    Args:
        step: The step under way.
        old: The examples that did not fit.
        new: The largest number from now on.
    """
    text = OUT_OF_MEMORY.format(step=step, old=old, new=new)
    return Event(step, 0, "out_of_memory", "", "", float(new), rank(), text)


def _short(size: float) -> str:
    return f"{size:,.0f}" if size >= 100 else f"{size:.3g}"

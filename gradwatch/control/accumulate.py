"""Accumulation: how many micro-batches make a step, and how far the window has come."""

from __future__ import annotations

from gradwatch.errors import AccumulationError

TOO_EARLY = (
    "{optimizer}.step() was called after {found} of the {wanted} micro-batches that "
    "watch(accumulate={wanted}) asks for: the update would use a part of the window only. "
    "Call watcher.step() after every micro-batch, it steps the optimizer when the window is full "
    "(watcher.step(last=True) for a short last one), or pass the number that your loop "
    "accumulates, watch(accumulate={found})."
)
TOO_LATE = (
    "{found} micro-batches came before {optimizer}.step(), but watch(accumulate={wanted}) asks for "
    "{wanted}: the gradient would have a weight of {found}/{wanted}. Call watcher.step() after "
    "every micro-batch, it steps the optimizer when the window is full, or pass the number that "
    "your loop accumulates, watch(accumulate={found})."
)


def check_window(optimizer: str, found: int, wanted: int) -> None:
    """Refuses a step whose window has another number of micro-batches than was asked for.

    Args:
        optimizer: Label of the optimizer that is about to step.
        found: Micro-batches in its window.
        wanted: Micro-batches that make a step; with 1 every number is taken.

    Raises:
        AccumulationError: If they differ.
    """
    if wanted > 1 and found != wanted:
        text = TOO_EARLY if found < wanted else TOO_LATE
        raise AccumulationError(text.format(optimizer=optimizer, found=found, wanted=wanted))

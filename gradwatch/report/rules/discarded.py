"""Discarded: gradients that were thrown away before any step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from gradwatch.record.records import Event
from gradwatch.record.wording import counted
from gradwatch.report.finding import Evidence, Finding, Severity, first_steps
from gradwatch.report.run_data import RunData
from gradwatch.report.thresholds import Thresholds

LASTING = 10  # gradients thrown away in a row, up to the end, after which a run stands still

WHY = (
    "The batch of a gradient that is thrown away teaches the model nothing, and a loop that throws "
    "all of them away goes on with weights that stand still. {fate}"
)
STANDS = (
    "The last {count} were thrown away without a step between them: the model no longer learns."
)
MOVES = "The run took further steps after it."
POISONED = (
    "{count} of them held a NaN or an Inf{where}: look at the batches and at what this report says "
    'about the norms before them. watch(..., on_nonfinite="skip") leaves such steps out as well, '
    "and keeps their record."
)
FINITE = (
    "All of them were finite. Look for a zero_grad() between backward() and step(), or inside of a "
    "loop over micro-batches, and for a condition that leaves step() out. Take a gradient for "
    "another purpose with torch.autograd.grad(), which leaves .grad alone."
)


def discarded(run: RunData, limits: Thresholds) -> Iterator[Finding]:
    """Finds optimizers whose gradients are thrown away: if one was not finite, or in many steps."""
    events = [one for one in run.events if one.kind == "discarded"]
    for optimizer in dict.fromkeys(one.optimizer for one in events):
        mine = [one for one in events if one.optimizer == optimizer]
        steps = next((one for one in run.optimizers if one.optimizer == optimizer), None)
        rows, last, before = 0, 0, 0
        if steps is not None:
            # A step without a backward has used none of the gradients.
            rows, last = int((steps["micro_batches"] > 0).sum()), int(steps.step[-1])
            before = int(steps["discarded"].sum())
        at_the_end = sum(one.step > last for one in mine)
        # Of events only the first and the newest are kept, of steps those in the buffer.
        total = max(before + at_the_end, len(mine))
        poisoned = [one for one in mine if not math.isfinite(one.value)]
        often = total > limits.discarded * (rows + total)
        if poisoned or often:
            yield _finding(run, mine, poisoned, (total, rows, at_the_end))


def _finding(
    run: RunData, events: Sequence[Event], poisoned: Sequence[Event], counts: tuple[int, int, int]
) -> Finding:
    total, rows, at_the_end = counts
    first = events[0].step
    title = (
        f"{counted(total, 'gradient')} of {total + rows:,} ({total / (total + rows):.1%}) "
        f"{'was' if total == 1 else 'were'} thrown away before any step, the first before step "
        f"{first}."
    )
    stands = at_the_end >= LASTING
    fate = STANDS.format(count=at_the_end) if stands else MOVES if rows else ""
    numbers = {"discarded": float(total), "steps": float(rows), "nonfinite": float(len(poisoned))}
    names: tuple[str, ...] = ()
    advice = FINITE
    if poisoned:
        names = _first_bad(run, poisoned)
        where = f", first in {names[0]}" if names else ""
        advice = POISONED.format(count=len(poisoned), where=where)
    numbers_of_steps = dict.fromkeys(one.step for one in events)
    seen = Evidence(first_steps(numbers_of_steps), names, numbers, events[0].optimizer)
    # One that was finite may be what was left over when the run ended.
    once = total == 1 and not poisoned
    severity: Severity = "critical" if stands else "note" if once else "warning"
    return Finding("discarded", severity, title, seen, WHY.format(fate=fate).strip(), advice)


def _first_bad(run: RunData, poisoned: Sequence[Event]) -> tuple[str, ...]:
    """Returns the parameter that went bad first in the first of these gradients."""
    events = run.events_of(poisoned[0].optimizer, ("nan", "inf"))
    return tuple(one.parameter for one in events if one.step == poisoned[0].step)[:1]

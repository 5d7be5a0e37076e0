"""NaN and Inf: where they began, and how the norms were before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from gradwatch.record.columns import Array
from gradwatch.record.events import ToldCause, told_cause
from gradwatch.record.explanation import Explanation
from gradwatch.record.records import Event
from gradwatch.record.wording import counted
from gradwatch.report.explained import is_found
from gradwatch.report.finding import Evidence, Finding, first_steps
from gradwatch.report.run_data import OptimizerArrays, RunData
from gradwatch.report.thresholds import Thresholds

_RISE = 5  # number of steps before the first bad one in which norms may rise

WORDS = {"nan": "NaN", "inf": "Inf", "overflow": "overflow of the norm"}
WHY = (
    "A NaN or Inf that reaches the weights stays there: every later step of the parameter is lost. "
    "{fate}"
)
WHY_EXPLAINED = "A NaN or Inf that reaches the weights stays there."
WHY_OVERFLOW = (
    "The squares of the elements overflow, so clip_grad_norm_ meets an infinite norm and "
    "multiplies all gradients by 0: such a step teaches nothing. gradwatch's own clip takes the "
    "true norm."
)
ADVICE_OVERFLOW = (
    "Gradients of this size mean that training has diverged, or that the loss is not scaled to its "
    'batch. Lower the learning rate, and clip from the start: watch(..., clip="auto").'
)
LOST = "{count} of these steps reached the weights, which are spoiled from step {step} on."
SPARED = "None of these steps was applied, so the weights are intact."
RISING = (
    "The norm rose from {low:.3g} to {high:.3g} before that: training diverged. Lower the learning "
    'rate, at first by a factor of ten, warm it up, or clip: watch(..., clip="auto").'
)
SCALED = (
    "The loss was multiplied by {scale:,.0f}, so the scaled gradient overflowed float16. Let the "
    "GradScaler skip such steps (scaler.step, scaler.update), or start it with a lower scale."
)
FROM_START = (
    "It was there in the first step: check the inputs, the initial weights, and functions at the "
    "edge of their domain, such as log(0), sqrt(0) or 0/0, in the model and the loss{explain}."
)
SUDDEN = (
    "The norms before that were ordinary, so look for a single bad batch, or a function at the "
    "edge of its domain (log(0), sqrt(0), 0/0) in the model or the loss: the first gradient that "
    "went bad is most often that of the last layer, wherever it began. Check the data of {place} "
    "in step {step}{on_rank}{explain}."
)
OF_CAUSE: dict[ToldCause, str] = {
    "weights": (
        "The weights were bad before the gradients were, so the batch is not the cause. Look at "
        "what wrote to the weights before step {step}: an update whose learning rate, eps or "
        "division made NaN or Inf of them, a checkpoint, or code of the loop."
    ),
    "after": (
        "The backward had left it finite, so neither the batch nor the model is the cause. Look at "
        "what the loop does with gradients between backward() and step(): a clip, a division by a "
        "count or norm that can be 0 or Inf, a write to .grad."
    ),
    "overflow": (
        "The backward had left finite gradients, but their norm was beyond float32, and what came "
        "between backward() and step(), such as a clip, made NaN of them. gradwatch's own clip "
        "takes the true norm: watch(..., clip=...). Gradients of this size mean that training has "
        "diverged: lower the learning rate."
    ),
    "loop": (
        "No backward was seen to make it. Look at the loss and the data of step {step}, at what "
        "sets .grad in the loop, and whether zero_grad() comes after every step, also after one "
        "that was bad or skipped."
    ),
}
INITIAL_WEIGHTS = (
    "The weights were bad before the first step, so the batch is not the cause. Look at where the "
    "initial weights come from: a checkpoint, their initialization, or code before the loop."
)
ON_RANK = " on rank {rank}"
ON_ANY_RANK = ", on every rank: the record does not tell which of them it came from"
EXPLAIN = (
    '; watch(..., on_nonfinite="explain"), or gradwatch run --on-nonfinite explain, names the line '
    "that made it"
)
AND_SKIP = ", and skips such steps"


def nonfinite(run: RunData, limits: Thresholds) -> Iterator[Finding]:
    """Finds gradients with a NaN or Inf, and norms beyond float32.

    Steps that a ``GradScaler`` skipped are normal; the rule on loss scales judges those.
    """
    for steps in run.optimizers:
        bad = steps.nonfinite & ~steps.by_scaler
        told = _first_told(run.explanations_of(steps.optimizer, ("nan", "inf")))
        if bad.any():
            yield _finding(run, steps, bad, limits, told)
        elif told is not None:
            yield _left_memory(told, steps.optimizer)
        left_out = set(steps.step[steps.nonfinite | steps.by_scaler].tolist())
        events = run.events_of(steps.optimizer, ("overflow",))
        events = [one for one in events if one.step not in left_out]
        if events:
            told = _first_told(run.explanations_of(steps.optimizer, ("overflow",)))
            yield _overflow(events, steps.optimizer, told)


def _first_told(explanations: Sequence[Explanation]) -> Explanation | None:
    """Returns the first explanation that names a cause, or else the first one."""
    first = next(iter(explanations), None)
    return next(filter(is_found, explanations), first)


def _left_memory(told: Explanation, optimizer: str) -> Finding:
    """Makes the finding of an explained step that a live run has no record of any more."""
    title = f"{WORDS[told.kind]} in step {told.step}{_cause(told, told.step)}."
    seen = Evidence((told.step,), (), {}, optimizer)
    return Finding(told.kind, "warning", title, seen, WHY_EXPLAINED, told.advice, told)


def _cause(told: Explanation | None, first: int) -> str:
    """Returns what an explanation adds to the title of a finding that begins at step ``first``.

    Empty if it names no cause.
    """
    if told is None or not is_found(told):
        return ""
    later = "" if told.step == first else f"; in step {told.step}"
    return f"{later}: {told.summary.rstrip('.')}"


def _overflow(events: Sequence[Event], optimizer: str, told: Explanation | None) -> Finding:
    numbers = tuple(dict.fromkeys(one.step for one in events))
    names = tuple(dict.fromkeys(one.parameter for one in events))[:3]
    if told is not None and told.largest_parameters:
        names = tuple(one.name for one in told.largest_parameters)
    first = numbers[0]
    title = (
        f"The norm of finite gradients was beyond float32 in {counted(len(numbers), 'step')}, from "
        f"step {first} on; the largest gradient was that of {names[0]}{_cause(told, first)}."
    )
    largest = {
        "steps": float(len(numbers)),
        "largest_norm": float(max(one.value for one in events)),
    }
    seen = Evidence(first_steps(numbers), names, largest, optimizer)
    advice = ADVICE_OVERFLOW if told is None else told.advice or ADVICE_OVERFLOW
    return Finding("overflow", "warning", title, seen, WHY_OVERFLOW, advice, told)


def _finding(
    run: RunData,
    steps: OptimizerArrays,
    bad: Array,
    limits: Thresholds,
    told: Explanation | None,
) -> Finding:
    lost = steps.step[bad & steps.applied]
    first = steps.step[bad][0]
    event = _first_event(run.events_of(steps.optimizer, ("nan", "inf")), first)
    if event is None:
        event = _first_event(run.events_of(steps.optimizer, ("overflow",)), first)
    kind = "nan" if event is None else event.kind
    name = "" if event is None else event.parameter
    micro_batches = int(steps["micro_batches"][bad][0])
    where = f", first in {name}{_where(event, micro_batches)}" if event is not None and name else ""
    # The first bad parameter is seldom near the cause: once that is known, it is only evidence.
    where = _cause(told, int(first)) or where
    numbers = {"steps": float(bad.sum()), "applied": float(len(lost))}
    if event is not None:
        if event.micro_batch:
            numbers["micro_batch"] = float(event.micro_batch)
        numbers["rank"] = float(event.rank)
        # The counts are -1 if the gradient was gone before its elements could be counted.
        counts = {"nan_count": event.nan_count, "inf_count": event.inf_count}
        numbers |= {key: float(count) for key, count in counts.items() if count >= 0}
    fate = LOST.format(count=len(lost), step=int(lost[0])) if len(lost) else SPARED
    return Finding(
        kind,
        "critical" if len(lost) else "warning",
        f"{WORDS[kind]} in {counted(int(bad.sum()), 'step')}, "
        f"from step {steps.step[bad][0]} on{where}.",
        Evidence(first_steps(steps.step[bad]), (name,) if name else (), numbers, steps.optimizer),
        WHY.format(fate=fate),
        (told.advice if told is not None else "") or _advice(steps, bad, event, limits),
        told,
    )


def _first_event(events: Iterable[Event], step: int) -> Event | None:
    # Events of a step are in the order they happened; later ones may only be consequences.
    return next((one for one in events if one.step == step), None)


def _where(event: Event, micro_batches: int) -> str:
    batch, rank = event.micro_batch, event.rank
    outside = told_cause(event.message) in ("after", "overflow", "loop")
    place = ", outside of the backward" if outside else ""
    if batch:
        place = f", {_place(batch, micro_batches)}"
    return place + (", rank not known" if rank < 0 else f", rank {rank}" if rank else "")


def _on_rank(rank: int) -> str:
    return ON_ANY_RANK if rank < 0 else ON_RANK.format(rank=rank) if rank else ""


def _place(number: int, micro_batches: int) -> str:
    """Names the backward with this number in a step of so many micro-batches; 0 for all."""
    if not number:
        return "every micro-batch"
    return f"backward {number}" if number > micro_batches else f"micro-batch {number}"


def _advice(steps: OptimizerArrays, bad: Array, event: Event | None, limits: Thresholds) -> str:
    row = int(np.flatnonzero(bad)[0])
    before = steps["grad_norm"][:row]
    before = before[np.isfinite(before)]
    facts = {
        "place": _place(
            0 if event is None else event.micro_batch,
            max(1, int(steps["micro_batches"][row])),
        ),
        "step": int(steps.step[row]),
        "on_rank": "" if event is None else _on_rank(event.rank),
        "explain": EXPLAIN + (AND_SKIP if (bad & steps.applied).any() else ""),
    }
    # The most certain cause first: what was seen, a loss scale, rising norms, the step itself.
    cause = None if event is None else told_cause(event.message)
    if cause == "weights" and steps.step[row] == 1:
        return INITIAL_WEIGHTS
    if cause is not None:
        return OF_CAUSE[cause].format(**facts)
    scale = float(steps["loss_scale"][row])
    if scale > 1:
        return SCALED.format(scale=scale)
    if not len(before):
        return FROM_START.format(**facts)
    usual = _usual_before(before)
    # If all norms were 0, any norm is a rise: tiny avoids a division by 0.
    if before[-_RISE:].max() / max(usual, np.finfo(np.float64).tiny) >= limits.rise:
        return RISING.format(low=usual, high=before[-_RISE:].max())
    return SUDDEN.format(**facts)


def _usual_before(norms: Array) -> float:
    """Returns the norm that a rise is measured from: the first one, or the median if lower."""
    return float(min(norms[0], np.median(norms[:-_RISE]) if len(norms) > 2 * _RISE else norms[0]))

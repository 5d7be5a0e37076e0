"""Every event with its text, and the errors that tell of one."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from gradwatch.accumulate.noise_scale import NoiseScale
from gradwatch.errors import NonFiniteGradientError
from gradwatch.hooks.data_parallel import rank, several_ranks
from gradwatch.measure.norms import FirstNonFinite, Measurement, Origin
from gradwatch.measure.parameters import ParameterTable
from gradwatch.record.records import Event, EventKind, StepRecord

if TYPE_CHECKING:
    from gradwatch.record.explanation import Explanation

ToldCause = Literal["weights", "loop", "overflow", "after"]

NONFINITE = (
    "{what} in the gradient of {parameter} ({counts}), {where}; {affected} parameter(s) "
    "affected.{more}"
)
MADE_AFTER = "made after the last backward"
MADE_BETWEEN = "made between two backwards"
MADE_BY_LOOP = "where no backward was seen to make it"
LEFT_STALE = "left in it since an earlier step"
WEIGHTS_FIRST = " Weights were NaN or Inf before that"
WHERE = {
    Origin.BACKWARD: "the first in backward order, in {unit} {batch} of step {step}",
    Origin.NO_ORDER: "in {unit} {batch} of step {step}",
    Origin.SEVERAL: "in one of {several} 1 to {batch} of step {step}",
    Origin.AFTER: f"{MADE_AFTER} of step {{step}}",
    Origin.STALE: f"{LEFT_STALE}, at the beginning of step {{step}}",
    Origin.WEIGHTS: "in {unit} {batch} of step {step}",
}
BETWEEN = f"{MADE_BETWEEN}, {{several}} {{batch}} and {{next}} of step {{step}}"
BY_LOOP = f"in step {{step}}, {MADE_BY_LOOP}"
FINITE_UNTIL = (
    " It was finite when the backward ended, so look at what the loop does with gradients after "
    "that: a clip, a division, a write to .grad."
)
FINITE_UNTIL_REDUCED = (
    " It was finite on this rank when the backward ended: it came from another rank if the loop "
    "averages gradients over ranks by itself, or else from what it does with them after that."
)
OVERFLOWED = "was beyond float32: a clip that computes it in float32 multiplies by 0 or by NaN."
OVERFLOWED_UNTIL = (
    f" Its elements were finite when the backward ended, but their norm {{norm:.3g}} {OVERFLOWED}"
)
SET_BY_LOOP = " The loop has set it itself, or has not zeroed it since an earlier step."
NOT_ZEROED = " Nothing has zeroed it since: call zero_grad() after a step that is bad, too."
BAD_WEIGHTS = (
    "{first} ({names}). Look for what wrote to them last: the update of the step before, or the "
    "loop."
)
CAME_WITH_REDUCTION = (
    " It came with the reduction over the ranks: this rank's own gradient was finite."
)
RANK_NOT_KNOWN = " Which rank it came from is not known."
CAME_FROM = " It came from rank {rank}."
COUNTS = "{nan} NaN and {inf} Inf of {total} elements"
NOT_COUNTED = "not counted: it was gone when its norm arrived from the device"
INF_OR_LARGE = "Inf, or a norm beyond float32,"
POISONED = (
    "NaN or Inf in {buffers} of the model after step {step}, whose gradients had it too: a forward "
    "has written it there. Running statistics do not recover from that, so eval() gives NaN. Load "
    "these buffers from a checkpoint, or call reset_running_stats() on the layers{advice}."
)
PUTS_BACK = '; watch(..., on_nonfinite="skip") puts buffers back with the step'
NOT_PUT_BACK = (
    "Step {step} was skipped, but its forward had changed {buffers} of the model, which could not "
    "be put back: buffers are copied up to {most} MiB in all, and the largest are left out. Load "
    "these buffers from a checkpoint, if what one batch has changed in them matters."
)
OVERFLOW = (
    "The gradients of step {step} are finite, but their norm {value:.3g} is beyond float32; the "
    "largest is that of {parameter}."
)
EXPLODING = (
    "The gradient norm {value:.4g} of step {step} is above the limit {limit:g}; the largest "
    "is that of {parameter}."
)
NO_GRADIENT = (
    "{parameter} requires a gradient and is in {optimizer}, but received none in step {step}: it "
    "takes no part in the loss, or its branch is detached."
)
SKIPPED = "Step {step} was not applied ({outcome}): weights and optimizer state are as before."
# A fused SGD that a scaler makes skip its first step keeps momentum buffers without a value.
SKIPPED_BY_SCALER = "Step {step} was not applied (skipped_scaler): the weights are as before."
SKIPPED_MIDWAY = (
    "Step {step} was skipped ({outcome}), but {optimizer} had moved the weights by then, and they "
    "could not be put back: it moves them between two evaluations of its closure, or without a "
    "gradient, which it had not done in earlier steps. Go back to a checkpoint if it matters."
)
CHANGED = "From step {step} on a step has {new} micro-batches instead of {old}{why}."
WHY = ": the noise scale is {noise} \N{PLUS-MINUS SIGN} {stderr} at a batch of {batch}"
WHY_AT_LEAST = ": the noise scale is at least {low} at a batch of {batch}"
DROPPED = (
    "{count} micro-batch(es) of weight {weight:g} were in the window of step {step} when its state "
    "was saved. Their gradients are not in a checkpoint: the window begins anew, and they are lost."
)
OUT_OF_MEMORY = (
    "A micro-batch of {old} examples did not fit into memory in step {step}. The batch was run "
    "again in micro-batches of at most {new}, and later ones will be."
)
DISCARDED = (
    "{what} with norm {norm:.4g}{loss} would have been step {record.step} of {record.optimizer}, "
    "but {why} before any step: thrown away."
)
SAME_DATA = (
    "The ranks see the same data: for {steps} steps in a row the mean gradient over {ranks} ranks "
    "was this rank's own, so the ranks repeat each other's work. Unless this is intended, give "
    "each rank its own part of the data (DistributedSampler, with set_epoch() in every epoch), and "
    "seed by the rank what is random about the data."
)
RAISED = (
    '{story} on_nonfinite="raise" stopped the training {when}. Look at the '
    'batch and at the loss of this step; with on_nonfinite="skip" the step is left out instead.'
)
AS_BEFORE = "before this step: weights and optimizer state are as before it"
MOVED = (
    "in the middle of this step, when the optimizer had moved the weights between two evaluations "
    "of its closure"
)
TOO_MANY_SKIPS = (
    "{steps} steps in a row were left out, and the next one would be too (step {record.step} of "
    "{record.optimizer}, gradient norm {record.grad_norm:.4g}, loss {record.loss:.4g}{rates}). "
    "{story} "
    "Weights and optimizer state are those of the last good step. A run that meets nothing but bad "
    "steps does not recover by itself: go back to an earlier checkpoint, lower the learning rate "
    "or leave out the data that it meets here; watch(max_consecutive_skips=...) sets how many are "
    "let pass."
)
FLOAT32 = float(np.finfo(np.float32).max)
NO_STORY = "The gradient norm of step {step} is {norm:.4g}."


def nonfinite_event(
    record: StepRecord,
    first: FirstNonFinite,
    table: ParameterTable,
    backwards: int,
    overflowed: bool = False,
    by_hand: bool = False,
) -> Event:
    """Makes the event that names the parameter that went bad first.

    Args:
        record: The step.
        first: The parameter.
        table: All watched parameters.
        backwards: The number of backwards in the step, which may be more than its micro-batches.
        overflowed: Whether the gradients were finite at the end of the backward, but not their
            norm.
        by_hand: Whether the loop may have averaged the gradients over ranks by itself.

    Returns:
        An event of kind ``nan``, or ``inf`` if the parameter had no NaN.
    """
    name, counts = table.names[first.index], NOT_COUNTED
    # A norm may arrive from the device after its gradient was freed or overwritten. Then the
    # elements cannot be counted any more, and only the norm tells.
    nan, inf, value = -1, -1, first.norm
    if first.counts is not None:
        nan, inf = first.counts
        value = float(nan or inf)
        counts = COUNTS.format(nan=nan, inf=inf, total=table.elements(first.index))
    where, more = _origin(record, first, table, backwards, overflowed)
    if by_hand and first.origin is Origin.AFTER:
        first, more = replace(first, rank=None), FINITE_UNTIL_REDUCED
    message = NONFINITE.format(
        what="NaN" if first.is_nan else "Inf" if first.counts else INF_OR_LARGE,
        parameter=name,
        counts=counts,
        where=where,
        affected=record.nonfinite_parameters,
        more=more,
    )
    in_backward = first.origin in (Origin.BACKWARD, Origin.NO_ORDER, Origin.WEIGHTS)
    origin = _rank_or_unknown(first.rank)
    if origin < 0:
        message += RANK_NOT_KNOWN if first.rank is None else CAME_WITH_REDUCTION
    return _event(
        record,
        "nan" if first.is_nan else "inf",
        value,
        message,
        (name, table.modules[first.index]),
        origin,
        micro_batch=first.micro_batch if in_backward else 0,
        nan_count=nan,
        inf_count=inf,
    )


def _origin(
    record: StepRecord,
    first: FirstNonFinite,
    table: ParameterTable,
    backwards: int,
    overflowed: bool,
) -> tuple[str, str]:
    """Says where a gradient went bad, and what follows from that."""
    origin, batch = first.origin, first.micro_batch
    where, more = WHERE[origin], ""
    if origin is Origin.WEIGHTS:
        where = where if batch else "in step {step}"
        names = some_names([table.names[index] for index in first.weights])
        more = BAD_WEIGHTS.format(first=WEIGHTS_FIRST, names=names)
    elif origin is Origin.STALE:
        more = NOT_ZEROED
    elif origin is Origin.AFTER and not batch:
        where, more = BY_LOOP, SET_BY_LOOP
    elif origin is Origin.AFTER:
        where = where if batch == backwards else BETWEEN
        more = OVERFLOWED_UNTIL.format(norm=record.grad_norm) if overflowed else FINITE_UNTIL
    unit = "backward" if backwards > record.micro_batches else "micro-batch"
    several = unit + ("s" if unit == "backward" else "es")
    words = {"unit": unit, "several": several, "batch": batch, "next": batch + 1}
    return where.format(**words, step=record.step), more


def told_cause(message: str) -> ToldCause | None:
    """Returns what made a gradient bad other than its backward, by the message of its event.

    None if the backward did, as far as it is known.
    """
    if WEIGHTS_FIRST in message:
        return "weights"
    if MADE_BY_LOOP in message or LEFT_STALE in message:
        return "loop"
    if MADE_AFTER in message or MADE_BETWEEN in message:
        return "overflow" if OVERFLOWED in message else "after"
    return None


def with_rank(event: Event, rank: int) -> Event:
    """Returns an event of reduced gradients with the rank that made them bad, found out later."""
    message = event.message
    for unknown in (CAME_WITH_REDUCTION, RANK_NOT_KNOWN):
        message = message.removesuffix(unknown)
    return replace(event, rank=rank, message=message + CAME_FROM.format(rank=rank))


def overflow_event(record: StepRecord, measurement: Measurement, table: ParameterTable) -> Event:
    """Makes the event of finite gradients whose norm is beyond float32."""
    name, module = _largest(measurement, table)
    message = OVERFLOW.format(step=record.step, value=record.grad_norm, parameter=name)
    origin = _rank_or_unknown(_rank_above(record, FLOAT32))
    return _event(record, "overflow", record.grad_norm, message, (name, module), origin)


def exploding_event(
    record: StepRecord, measurement: Measurement, table: ParameterTable, limit: float
) -> Event:
    """Makes the event of a norm above ``limit``, which is ``watch(exploding_norm=)``."""
    norm, (name, module) = record.grad_norm, _largest(measurement, table)
    message = EXPLODING.format(step=record.step, value=norm, limit=limit, parameter=name)
    origin = _rank_or_unknown(_rank_above(record, limit))
    return _event(record, "exploding", norm, message, (name, module), origin)


def skipped_event(record: StepRecord, moved: bool = False, because: Sequence[Event] = ()) -> Event:
    """Makes the event of a step that was not applied.

    Args:
        record: The step.
        moved: Whether it has changed the weights nevertheless.
        because: The events of what was wrong in it; the first one says from which rank that came.
    """
    text = SKIPPED_BY_SCALER if record.outcome == "skipped_scaler" else SKIPPED
    text = SKIPPED_MIDWAY if moved else text
    message = text.format(step=record.step, outcome=record.outcome, optimizer=record.optimizer)
    origin = because[0].rank if because else _rank_or_unknown(None)
    return _event(record, "skipped", record.grad_norm, message, origin=origin)


def discarded_event(record: StepRecord, why: str) -> Event:
    """Makes the event of gradients that were thrown away; the step of ``record`` never came."""
    count = record.micro_batches
    what = (
        "The gradient of 1 micro-batch" if count == 1 else f"The gradients of {count} micro-batches"
    )
    loss = "" if math.isnan(record.loss) else f" and loss {record.loss:.4g}"
    text = DISCARDED.format(what=what, norm=record.grad_norm, loss=loss, record=record, why=why)
    return _event(record, "discarded", record.grad_norm, text)


def poisoned_event(record: StepRecord, names: Sequence[str], skips: bool) -> Event:
    """Makes the event of buffers that hold a NaN or Inf after a step whose gradients did.

    ``skips`` says whether such steps are skipped in this run.
    """
    buffers, advice = counted_names(names, of="buffer"), "" if skips else PUTS_BACK
    text = POISONED.format(buffers=buffers, step=record.step, advice=advice)
    return _event(record, "poisoned", float(len(names)), text)


def not_put_back_event(step: int, optimizer: str, names: Sequence[str], most: int) -> Event:
    """Makes the event of buffers that a skipped step has changed; ``most`` bytes are copied."""
    buffers = counted_names(names, of="buffer")
    text = NOT_PUT_BACK.format(buffers=buffers, step=step, most=most // 2**20)
    return _event(StepRecord(step, optimizer), "poisoned", float(len(names)), text)


def explained_event(explanation: Explanation, global_step: int = 0) -> Event:
    """Makes the event that says in one line where a NaN, an Inf or too large a gradient came from.

    ``global_step`` is the x-axis of loggers at that step.
    """
    one = explanation
    record = StepRecord(one.step, one.optimizer, global_step=global_step)
    message = f"{one.summary} ({one.source})" if one.source else one.summary
    of = (one.parameter, one.module or "")
    batch = one.micro_batch
    return _event(record, "explained", float(one.count), message, of, one.rank, micro_batch=batch)


def no_gradient_events(
    record: StepRecord, missing: Sequence[int], table: ParameterTable
) -> list[Event]:
    """Makes an event for each parameter without a gradient, given by its index in the table."""
    events = []
    for index in missing:
        name, module = table.names[index], table.modules[index]
        message = NO_GRADIENT.format(parameter=name, optimizer=record.optimizer, step=record.step)
        events.append(_event(record, "no_gradient", 0.0, message, (name, module)))
    return events


def changed_event(step: int, old: int, new: int, noise: NoiseScale | None) -> Event:
    """Makes the event of a change in the number of micro-batches per step.

    Args:
        step: The first step with the new number.
        old: Micro-batches before it.
        new: Micro-batches from this step on.
        noise: The noise scale that decided; None for a schedule.
    """
    why = ""
    if noise is not None and math.isfinite(noise.b_simple):
        sizes = {"noise": noise.b_simple, "stderr": noise.stderr, "batch": noise.batch}
        sizes["low"] = noise.low
        text = WHY_AT_LEAST if noise.out_of_range and noise.low > 0 else WHY
        why = text.format(**{name: _short(size) for name, size in sizes.items()})
    text = CHANGED.format(step=step, new=new, old=old, why=why)
    return _event(StepRecord(step), "accumulate", float(new), text)


def dropped_event(step: int, count: int, weight: float) -> Event:
    """Makes the event of a run that was resumed in the middle of a window.

    Args:
        step: The step that the window was for.
        count: Micro-batches whose gradients are lost.
        weight: Sum of their weights.
    """
    text = DROPPED.format(step=step, count=count, weight=weight)
    return _event(StepRecord(step), "dropped", float(count), text)


def out_of_memory_event(step: int, old: int, new: int) -> Event:
    """Makes the event of a batch that did not fit into memory.

    Args:
        step: The step under way.
        old: Examples of the micro-batch that did not fit.
        new: The most examples that a micro-batch has from now on.
    """
    text = OUT_OF_MEMORY.format(step=step, old=old, new=new)
    return _event(StepRecord(step), "out_of_memory", float(new), text)


def loop_event(
    kind: EventKind,
    message: str,
    step: int,
    optimizer: str = "none",
    parameter_and_module: tuple[str, str] = ("", ""),
    value: float = 0.0,
) -> Event:
    """Makes an event about the training loop itself, of kind ``changed`` or ``mistake``.

    Args:
        kind: The kind.
        message: One sentence or two: what was seen, and what to change.
        step: The step under way when it was seen.
        optimizer: Label of the optimizer that it concerns; ``"none"`` for all.
        parameter_and_module: The first parameter that it concerns, and the module that owns it.
        value: As the kind says.
    """
    return _event(StepRecord(step, optimizer), kind, value, message, parameter_and_module)


def counted_names(names: Sequence[str], most: int = 3, of: str = "parameter") -> str:
    """Names some parameters: ``"2 parameters (a, b)"``, with at most ``most`` names."""
    return f"{len(names)} {of}{'' if len(names) == 1 else 's'} ({some_names(names, most)})"


def some_names(names: Sequence[str], most: int = 3) -> str:
    """Names some parameters: ``"a, b, c, ..."``, with at most ``most`` names."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def same_data_event(record: StepRecord, steps: int, ranks: int) -> Event:
    """Makes the event of ranks whose gradients are equal: they see the same data.

    Args:
        record: The newest of the steps.
        steps: Number of steps in a row.
        ranks: Number of ranks.
    """
    return _event(record, "mistake", 0.0, SAME_DATA.format(steps=steps, ranks=ranks))


def tells_of_same_data(message: str) -> bool:
    """Returns whether the message of an event is that of :func:`same_data_event`."""
    return message.startswith(SAME_DATA[: SAME_DATA.index(":")])


def nonfinite_error(
    record: StepRecord, events: Sequence[Event], moved: bool = False
) -> NonFiniteGradientError:
    """Makes the error that ``on_nonfinite="raise"`` raises, from what was found in the step.

    ``moved`` says whether the step has changed the weights already.
    """
    when = MOVED if moved else AS_BEFORE
    return _error(RAISED.format(story=_story(record, events), when=when), record, events)


def too_many_skips_error(
    record: StepRecord, events: Sequence[Event], steps: int
) -> NonFiniteGradientError:
    """Makes the error that ends a run in which too many steps in a row were skipped.

    Args:
        record: The step that would be skipped next.
        events: What was found in it.
        steps: Number of steps skipped in a row before it.
    """
    text = TOO_MANY_SKIPS.format(
        steps=steps, record=record, story=_story(record, events), rates=_rates(record)
    )
    return _error(text, record, events)


def _event(
    record: StepRecord,
    kind: EventKind,
    value: float,
    message: str,
    parameter_and_module: tuple[str, str] = ("", ""),
    origin: int | None = None,
    *,
    micro_batch: int = 0,
    nan_count: int = 0,
    inf_count: int = 0,
) -> Event:
    # Accumulation and memory concern all optimizers: their events come with a record that has
    # nothing but a step, and its defaults, optimizer "none" and global_step 0, say just that.
    parameter, module = parameter_and_module
    return Event(
        step=record.step,
        micro_batch=micro_batch,
        kind=kind,
        parameter=parameter,
        module=module,
        value=value,
        rank=rank() if origin is None else origin,
        message=message,
        nan_count=nan_count,
        inf_count=inf_count,
        optimizer=record.optimizer,
        global_step=record.global_step,
    )


def _rank_or_unknown(origin: int | None) -> int:
    """Returns the rank that an average over ranks was spoiled by; -1 if it is not known."""
    if origin is None:
        return -1 if several_ranks() else rank()
    return origin


def _rank_above(record: StepRecord, limit: float) -> int | None:
    """Returns this rank if its own norm was above a limit too, -1 if not; None if not known."""
    own = record.grad_norm_local
    if math.isnan(own):
        return None
    return rank() if own > limit else -1


def _largest(measurement: Measurement, table: ParameterTable) -> tuple[str, str]:
    norms = measurement.norms.array()
    if not len(norms):  # on this rank: with sharded parameters the large one may be elsewhere
        return "", ""
    index = measurement.indices[int(np.argmax(norms))]
    return table.names[index], table.modules[index]


def _short(size: float) -> str:
    return f"{size:,.0f}" if size >= 100 else f"{size:.3g}"


def _rates(record: StepRecord) -> str:
    rates = json.loads(record.group_lr) if record.group_lr else [record.lr]
    texts = list(dict.fromkeys(f"{rate:.4g}" for rate in rates if math.isfinite(rate)))
    if not texts:  # None, or what an optimizer of its own computes
        return ""
    of_groups = " in its parameter groups" if len(texts) > 1 else ""
    return f", learning rate {', '.join(texts)}{of_groups}"


def _story(record: StepRecord, events: Sequence[Event]) -> str:
    if events:
        return events[0].message
    # A policy skips finite steps too, and of several ranks another one may have found the NaN.
    return NO_STORY.format(step=record.step, norm=record.grad_norm)


def _error(text: str, record: StepRecord, events: Sequence[Event]) -> NonFiniteGradientError:
    if not events:
        return NonFiniteGradientError(text, step=record.step)
    event = events[0]
    return NonFiniteGradientError(
        text,
        step=event.step,
        micro_batch=event.micro_batch,
        parameter=event.parameter,
        nan_count=event.nan_count,
        inf_count=event.inf_count,
    )

"""Every event with its text, and the errors that tell of one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gradwatch.accumulate.noise_scale import NoiseScale
from gradwatch.errors import NonFiniteGradientError
from gradwatch.hooks.data_parallel import rank
from gradwatch.measure.norms import FirstNonFinite, Measurement
from gradwatch.measure.parameters import ParameterTable
from gradwatch.record.records import Event, EventKind, StepRecord

NONFINITE = (
    "{what} in the gradient of {parameter} ({counts}), the "
    "first in backward order, in {place} {micro_batch} of step {step}; {affected} parameter(s) "
    "affected."
)
COUNTS = "{nan} NaN and {inf} Inf of {total} elements"
NOT_COUNTED = "not counted: it was gone when its norm arrived from the device"
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
    '{story} on_nonfinite="raise" stopped the training before any weight changed. Look at the '
    'batch and at the loss of this step; with on_nonfinite="skip" the step is left out instead.'
)
TOO_MANY_SKIPS = (
    "{steps} steps in a row were left out, and the next one would be too (step {record.step} of "
    "{record.optimizer}, gradient norm {record.grad_norm:.4g}, loss {record.loss:.4g}, learning "
    "rate {record.lr:.4g}). {story} "
    "Weights and optimizer state are those of the last good step. A run that meets nothing but bad "
    "steps does not recover by itself: go back to an earlier checkpoint, lower the learning rate "
    "or leave out the data that it meets here; watch(max_consecutive_skips=...) sets how many are "
    "let pass."
)
NO_STORY = "The gradient norm of step {step} is {norm:.4g}."


def nonfinite_event(
    record: StepRecord, first: FirstNonFinite, table: ParameterTable, backwards: int = 1
) -> Event:
    """Makes the event that names the parameter that went bad first.

    ``backwards`` is the number of backwards in the step, which may be more than its micro-batches.

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
        counts = COUNTS.format(nan=nan, inf=inf, total=table.tensors[first.index].numel())
    message = NONFINITE.format(
        what="NaN" if first.is_nan else "Inf",
        parameter=name,
        counts=counts,
        place="backward" if backwards > record.micro_batches else "micro-batch",
        micro_batch=first.micro_batch,
        step=record.step,
        affected=record.nonfinite_parameters,
    )
    return _event(
        record,
        "nan" if first.is_nan else "inf",
        value,
        message,
        (name, table.modules[first.index]),
        micro_batch=first.micro_batch,
        nan_count=nan,
        inf_count=inf,
    )


def overflow_event(record: StepRecord, measurement: Measurement, table: ParameterTable) -> Event:
    """Makes the event of finite gradients whose norm is beyond float32."""
    name, module = _largest(measurement, table)
    message = OVERFLOW.format(step=record.step, value=record.grad_norm, parameter=name)
    return _event(record, "overflow", record.grad_norm, message, (name, module))


def exploding_event(
    record: StepRecord, measurement: Measurement, table: ParameterTable, limit: float
) -> Event:
    """Makes the event of a norm above ``limit``, which is ``watch(exploding_norm=)``."""
    norm, (name, module) = record.grad_norm, _largest(measurement, table)
    message = EXPLODING.format(step=record.step, value=norm, limit=limit, parameter=name)
    return _event(record, "exploding", norm, message, (name, module))


def skipped_event(record: StepRecord) -> Event:
    """Makes the event of a step that was not applied."""
    message = SKIPPED.format(step=record.step, outcome=record.outcome)
    return _event(record, "skipped", record.grad_norm, message)


def discarded_event(record: StepRecord, why: str) -> Event:
    """Makes the event of gradients that were thrown away; the step of ``record`` never came."""
    count = record.micro_batches
    what = (
        "The gradient of 1 micro-batch" if count == 1 else f"The gradients of {count} micro-batches"
    )
    loss = "" if math.isnan(record.loss) else f" and loss {record.loss:.4g}"
    text = DISCARDED.format(what=what, norm=record.grad_norm, loss=loss, record=record, why=why)
    return _event(record, "discarded", record.grad_norm, text)


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


def counted_names(names: Sequence[str], most: int = 3) -> str:
    """Names some parameters: ``"2 parameters (a, b)"``, with at most ``most`` names."""
    shown = ", ".join(names[:most]) + (", ..." if len(names) > most else "")
    return f"{len(names)} parameter{'' if len(names) == 1 else 's'} ({shown})"


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


def nonfinite_error(record: StepRecord, events: Sequence[Event]) -> NonFiniteGradientError:
    """Makes the error that ``on_nonfinite="raise"`` raises, from what was found in the step."""
    return _error(RAISED.format(story=_story(record, events)), record, events)


def too_many_skips_error(
    record: StepRecord, events: Sequence[Event], steps: int
) -> NonFiniteGradientError:
    """Makes the error that ends a run in which too many steps in a row were skipped.

    Args:
        record: The step that would be skipped next.
        events: What was found in it.
        steps: Number of steps skipped in a row before it.
    """
    text = TOO_MANY_SKIPS.format(steps=steps, record=record, story=_story(record, events))
    return _error(text, record, events)


def _event(
    record: StepRecord,
    kind: EventKind,
    value: float,
    message: str,
    parameter_and_module: tuple[str, str] = ("", ""),
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
        rank=rank(),
        message=message,
        nan_count=nan_count,
        inf_count=inf_count,
        optimizer=record.optimizer,
        global_step=record.global_step,
    )


def _largest(measurement: Measurement, table: ParameterTable) -> tuple[str, str]:
    norms = measurement.norms.array()
    if not len(norms):  # on this rank: with sharded parameters the large one may be elsewhere
        return "", ""
    index = measurement.indices[int(np.argmax(norms))]
    return table.names[index], table.modules[index]


def _short(size: float) -> str:
    return f"{size:,.0f}" if size >= 100 else f"{size:.3g}"


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

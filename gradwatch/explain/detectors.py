"""Detectors: rules that turn the numbers of one step into events."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gradwatch.observe.measurement import Measurement
from gradwatch.observe.offender import Offender
from gradwatch.observe.parameters import ParameterTable
from gradwatch.observe.ranks import rank
from gradwatch.record.event import Event
from gradwatch.record.step import StepRecord

NONFINITE = (
    "{what} in the gradient of {parameter} ({counts}), the "
    "first in backward order, in micro-batch {micro_batch} of step {step}; {affected} parameter(s) "
    "affected."
)
COUNTS = "{nan} NaN and {inf} Inf of {total} elements"
NOT_COUNTED = "not counted: it was gone when its norm arrived from the device"
UNKNOWN = -1
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


def nonfinite_event(record: StepRecord, offender: Offender, table: ParameterTable) -> Event:
    """Names the parameter that went bad first.

    Args:
        record: The step in which it happened.
        offender: Where it was seen.
        table: The names.

    Returns:
        An event of kind ``nan``, or ``inf`` where the parameter had no NaN.
    """
    nan, inf = (UNKNOWN, UNKNOWN) if offender.counts is None else offender.counts
    name = table.names[offender.index]
    message = NONFINITE.format(
        what="NaN" if offender.is_nan else "Inf",
        parameter=name,
        counts=COUNTS.format(nan=nan, inf=inf, total=table.tensors[offender.index].numel())
        if offender.counts is not None
        else NOT_COUNTED,
        micro_batch=offender.micro_batch,
        step=record.step,
        affected=record.nonfinite_parameters,
    )
    return Event(
        step=record.step,
        micro_batch=offender.micro_batch,
        kind="nan" if offender.is_nan else "inf",
        parameter=name,
        module=table.modules[offender.index],
        value=offender.norm if offender.counts is None else float(nan or inf),
        rank=rank(),
        message=message,
        nan_count=nan,
        inf_count=inf,
        optimizer=record.optimizer,
        global_step=record.global_step,
    )


def overflow_event(record: StepRecord, measurement: Measurement, table: ParameterTable) -> Event:
    """Tells that finite gradients have a norm beyond float32.

    Args:
        record: The step.
        measurement: Its pre-clip numbers.
        table: The names.
    """
    name, module = _largest(measurement, table)
    message = OVERFLOW.format(step=record.step, value=record.grad_norm, parameter=name)
    return _event(record, "overflow", name, module, record.grad_norm, message)


def exploding_event(
    record: StepRecord, measurement: Measurement, table: ParameterTable, limit: float
) -> Event:
    """Tells that the norm is above the limit that the user set.

    Args:
        record: The step.
        measurement: Its pre-clip numbers.
        table: The names.
        limit: The limit.
    """
    name, module = _largest(measurement, table)
    message = EXPLODING.format(
        step=record.step, value=record.grad_norm, limit=limit, parameter=name
    )
    return _event(record, "exploding", name, module, record.grad_norm, message)


def skipped_event(record: StepRecord) -> Event:
    """Tells that the step was not applied.

    Args:
        record: The step.
    """
    message = SKIPPED.format(step=record.step, outcome=record.outcome)
    return _event(record, "skipped", "", "", record.grad_norm, message)


def no_gradient_events(
    record: StepRecord, missing: Sequence[int], table: ParameterTable
) -> list[Event]:
    """Tells which parameters received no gradient.

    Args:
        record: The step.
        missing: Their indices.
        table: The names.
    """
    return [
        _event(
            record,
            "no_gradient",
            table.names[index],
            table.modules[index],
            0.0,
            NO_GRADIENT.format(
                parameter=table.names[index], optimizer=record.optimizer, step=record.step
            ),
        )
        for index in missing
    ]


def _largest(measurement: Measurement, table: ParameterTable) -> tuple[str, str]:
    norms = measurement.norms.array()
    if not len(norms):
        return "", ""
    index = measurement.indices[int(np.argmax(norms))]
    return table.names[index], table.modules[index]


def _event(
    record: StepRecord, kind: str, parameter: str, module: str, value: float, message: str
) -> Event:
    return Event(
        step=record.step,
        micro_batch=0,
        kind=kind,  # type: ignore[arg-type]
        parameter=parameter,
        module=module,
        value=value,
        rank=rank(),
        message=message,
        optimizer=record.optimizer,
        global_step=record.global_step,
    )

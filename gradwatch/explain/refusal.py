"""Refusals: the errors that stop a training before a step, with the whole story in their text."""

from __future__ import annotations

from collections.abc import Sequence

from gradwatch.errors import NonFiniteGradientError
from gradwatch.record.event import Event
from gradwatch.record.step import StepRecord

RAISED = (
    '{story} on_nonfinite="raise" stopped the training before any weight changed. Look at the '
    'batch and at the loss of this step; with on_nonfinite="skip" the step is left out instead.'
)
TOO_MANY_SKIPS = (
    "{steps} steps in a row were left out, and the next one would be too (step {step} of "
    "{optimizer}, gradient norm {norm:.4g}, loss {loss:.4g}, learning rate {lr:.4g}). {story} "
    "Weights and optimizer state are those of the last good step. A run that meets nothing but bad "
    "steps does not recover by itself: go back to an earlier checkpoint, lower the learning rate "
    "or leave out the data that it meets here; watch(max_consecutive_skips=...) sets how many are "
    "let pass."
)
NO_STORY = "The gradient norm of step {step} is {norm:.4g}."


def nonfinite_error(record: StepRecord, events: Sequence[Event]) -> NonFiniteGradientError:
    """Makes the error that ``on_nonfinite="raise"`` raises.

    Args:
        record: The step that is not taken.
        events: What was found in it.
    """
    return _error(RAISED.format(story=_story(record, events)), record, events)


def too_many_skips_error(
    record: StepRecord, events: Sequence[Event], steps: int
) -> NonFiniteGradientError:
    """Makes the error that ends a run in which one step after the other was left out.

    Args:
        record: The step that would have been the next one.
        events: What was found in it.
        steps: How many in a row were left out before it.
    """
    text = TOO_MANY_SKIPS.format(
        steps=steps,
        step=record.step,
        optimizer=record.optimizer,
        norm=record.grad_norm,
        loss=record.loss,
        lr=record.lr,
        story=_story(record, events),
    )
    return _error(text, record, events)


def _story(record: StepRecord, events: Sequence[Event]) -> str:
    if events:
        return events[0].message
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

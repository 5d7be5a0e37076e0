"""Events say where something began, in words."""

import math

import pytest
import torch

from gradwatch.measure.deferred import Deferred
from gradwatch.measure.norms import FirstNonFinite, Measurement, NonFiniteCount
from gradwatch.measure.parameters import ParameterTable
from gradwatch.record import events
from gradwatch.record.records import StepRecord

TABLE = ParameterTable.of({"a.w": torch.ones(4, requires_grad=True), "b.w": torch.ones(2)})
RECORD = StepRecord(step=7, optimizer="Adam", grad_norm=5.0, nonfinite_parameters=2, global_step=70)


@pytest.mark.parametrize(("counts", "kind"), [((2, 1), "nan"), ((0, 3), "inf")])
def test_nonfinite_event_names_the_offender(counts, kind):
    """Parameter, micro-batch, exact counts and how far it spread."""
    event = events.nonfinite_event(
        RECORD, FirstNonFinite(0, 3, math.nan, NonFiniteCount(*counts)), TABLE, backwards=3
    )
    assert (event.kind, event.parameter, event.module, event.micro_batch) == (kind, "a.w", "a", 3)
    assert (event.nan_count, event.inf_count) == counts
    assert event.value == (counts[0] or counts[1])
    assert f"{counts[0]} NaN and {counts[1]} Inf of 4 elements" in event.message
    assert event.nonfinite
    assert (event.step, event.global_step, event.optimizer) == (7, 70, "Adam")


@pytest.mark.parametrize(("norm", "kind"), [(math.nan, "nan"), (math.inf, "inf")])
def test_what_was_gone_is_not_counted(norm, kind):
    """Where the gradient was gone when its norm arrived, the norm tells what it was."""
    event = events.nonfinite_event(RECORD, FirstNonFinite(0, 3, norm, None), TABLE, backwards=3)
    assert (event.kind, event.nan_count, event.inf_count) == (kind, -1, -1)
    assert "not counted" in event.message


def test_exploding_names_the_largest():
    """The parameter with the largest norm stands in the event."""
    measurement = Measurement(
        [0, 1], Deferred(torch.tensor([1.0, 4.9])), Deferred(torch.tensor(5.0))
    )
    event = events.exploding_event(RECORD, measurement, TABLE, 2.0)
    assert (event.parameter, event.value) == ("b.w", 5.0)
    assert "above the limit 2" in event.message
    assert not event.nonfinite


def test_skipped_says_why():
    """The outcome stands in the message."""
    record = StepRecord(step=1, outcome="skipped_nonfinite")
    assert "skipped_nonfinite" in events.skipped_event(record).message


def test_no_gradient_is_one_event_per_parameter():
    """Each missing parameter is named."""
    missing = events.no_gradient_events(RECORD, [0, 1], TABLE)
    assert [event.parameter for event in missing] == ["a.w", "b.w"]

"""The ring buffer: bounded, in order, both sides of the clip."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch.record.recorder import Entry, RingBuffer
from gradwatch.record.records import NO_GRADIENT, Layout, StepRecord

LAYOUT = Layout(names=("a", "b", "c"), modules=("", "", ""))


def _entry(step, coefficient=1.0, **more):
    record = StepRecord(step=step, clip_coef=coefficient)
    return Entry(record, [0, 2], np.array([step, 2 * step], np.float32), **more)


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(0, 30), st.integers(0, 40))
def test_keeps_the_newest_in_order(capacity, added, wanted):
    """Whatever was added, the newest stand there oldest first."""
    buffer = RingBuffer(LAYOUT, capacity)
    for step in range(1, added + 1):
        buffer.append(_entry(step))
    kept = list(range(max(1, added - min(capacity, wanted) + 1), added + 1)) if wanted else []
    batch = buffer.batch(wanted)
    assert [record.step for record in batch.steps] == kept
    assert batch.norms[:, 0].tolist() == kept
    assert (batch.norms[:, 1] == NO_GRADIENT).all()


def test_clipped_norms_follow_from_the_coefficient():
    """Where gradwatch alone clipped, the norms after are the norms before times the factor."""
    buffer = RingBuffer(LAYOUT, 4)
    buffer.append(_entry(1, coefficient=0.5))
    assert buffer.batch().clipped_norms.tolist() == [[0.5, NO_GRADIENT, 1.0]]


def test_measured_clipped_norms_win():
    """Where the loop clipped, the norms after are the measured ones, of that step only."""
    buffer = RingBuffer(LAYOUT, 4)
    buffer.append(_entry(1, coefficient=0.5))
    buffer.append(
        replace(_entry(2), clipped_columns=[0], clipped_norms=np.array([0.25], np.float32))
    )
    assert buffer.batch().clipped_norms.tolist() == [
        [0.5, NO_GRADIENT, 1.0],
        [0.25, NO_GRADIENT, NO_GRADIENT],
    ]


def test_float64_norms_are_kept_exactly():
    """A norm that no float32 holds comes back as it was, older ones too."""
    buffer = RingBuffer(LAYOUT, 4)
    buffer.append(_entry(1))
    wide = Entry(StepRecord(step=2), [1], np.array([1e300]))
    buffer.append(wide)
    assert buffer.batch().norms.tolist() == [
        [1.0, NO_GRADIENT, 2.0],
        [NO_GRADIENT, 1e300, NO_GRADIENT],
    ]


def test_statistics_stand_at_their_own_steps():
    """A step at which a statistic was not taken has NaN, also after the ring came round."""
    buffer = RingBuffer(LAYOUT, 2)
    buffer.append(_entry(1, statistics={"max": np.array([1.0, 2.0, 3.0])}))
    buffer.append(_entry(2))
    buffer.append(_entry(3))
    assert np.isnan(buffer.batch().statistics["max"]).all()


def test_a_batch_is_a_copy():
    """What a sink does to a batch does not reach the buffer."""
    buffer = RingBuffer(LAYOUT, 2)
    buffer.append(_entry(1))
    buffer.batch().norms[:] = 99
    assert buffer.batch().norms[0, 0] == 1.0


@pytest.mark.parametrize("coefficient", [float("nan"), 1.0])
def test_nan_norms_are_no_missing_gradients(coefficient):
    """A NaN norm stays one, on both sides of the clip."""
    buffer = RingBuffer(LAYOUT, 2)
    buffer.append(
        Entry(StepRecord(step=1, clip_coef=coefficient), [0], np.array([np.nan], np.float32))
    )
    batch = buffer.batch()
    assert np.isnan(batch.norms[0, 0])
    assert np.isnan(batch.clipped_norms[0, 0])
    assert batch.norms[0, 1] == NO_GRADIENT

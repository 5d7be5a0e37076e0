"""One row for several steps."""

import math

import pytest

from gradwatch.adapters import REDUCTIONS
from gradwatch_tensorboard.scalars import Thinner, reduce_scalar


def thinner(every):
    """Thins step scalars."""
    return Thinner(every, reduce_scalar)


def test_every_one_passes_rows_through():
    """Without thinning each step is written as it is and nothing is held."""
    thin = thinner(1)
    assert thin.add({"lr": 0.1}, now=False) == {"lr": 0.1}
    assert thin.rest() == {}


def test_gives_a_row_every_n_steps():
    """Between the rows there is nothing to write."""
    thin = thinner(3)
    rows = [thin.add({"grad_norm": float(step)}, now=False) for step in range(1, 8)]
    assert rows == [{}, {}, {"grad_norm": 3.0}, {}, {}, {"grad_norm": 6.0}, {}]
    assert thin.rest() == {"grad_norm": 7.0}
    assert thin.rest() == {}


def test_keeps_the_worst_between():
    """The largest norm and the smallest coefficient survive, counters and rates are the newest."""
    thin = thinner(3)
    thin.add({"grad_norm": 1.0, "clip_coef": 1.0, "lr": 0.3, "nonfinite_steps_total": 0}, now=False)
    thin.add({"grad_norm": 9.0, "clip_coef": 0.1, "lr": 0.2, "nonfinite_steps_total": 1}, now=False)
    row = thin.add(
        {"grad_norm": 2.0, "clip_coef": 0.9, "lr": 0.1, "nonfinite_steps_total": 1}, now=False
    )
    assert row == {"grad_norm": 9.0, "clip_coef": 0.1, "lr": 0.1, "nonfinite_steps_total": 1}


def test_notable_step_is_written_at_once():
    """A step with an event ends the interval and the count begins again."""
    thin = thinner(3)
    assert thin.add({"lr": 1.0}, now=True) == {"lr": 1.0}
    assert thin.add({"lr": 2.0}, now=False) == {}
    assert thin.add({"lr": 3.0}, now=False) == {}
    assert thin.add({"lr": 4.0}, now=False) == {"lr": 4.0}


def test_value_that_some_steps_lack_is_thinned_over_the_others():
    """A loss that only one of the steps has is written."""
    thin = thinner(2)
    thin.add({"loss": 2.5, "lr": 0.1}, now=False)
    assert thin.add({"lr": 0.2}, now=False) == {"loss": 2.5, "lr": 0.2}


@pytest.mark.parametrize("worst", [REDUCTIONS["largest"], REDUCTIONS["smallest"]])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_nan_wins(worst, position):
    """Thinning never hides a NaN, wherever it stands."""
    values = [1.0, 2.0]
    values.insert(position, math.nan)
    assert math.isnan(worst(values))


def test_median_and_newest():
    """The median leaves NaN out; the newest is the last."""
    assert REDUCTIONS["median"]([3.0, math.nan, 1.0, 2.0]) == 2.0
    assert math.isnan(REDUCTIONS["median"]([math.nan]))
    assert REDUCTIONS["newest"]([1.0, 2.0]) == 2.0

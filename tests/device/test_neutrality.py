"""A training on the device is, to the last bit, the same whether it is watched or not."""

import pytest

from tests.device.conftest import UNSUPPORTED
from tests.neutrality.covering import covering_array
from tests.neutrality.layouts import alone
from tests.neutrality.loop import Loop
from tests.neutrality.params import every_row
from tests.neutrality.settings import AXES, FORBIDDEN
from tests.neutrality.test_rarer import (
    test_a_model_in_two_dtypes_trains_alike,
    test_a_rarer_optimizer_trains_alike,
)
from tests.support.state import differences

__all__ = ["test_a_model_in_two_dtypes_trains_alike", "test_a_rarer_optimizer_trains_alike"]

STEPS = 8  # in which a scaler overflows, and grows again
MODELS = [name for name in AXES["model"] if name not in UNSUPPORTED]
PAIRS = covering_array({**AXES, "model": MODELS}, [*FORBIDDEN, {"model": UNSUPPORTED}])


@pytest.mark.parametrize("setting", every_row(PAIRS))
def test_a_watched_training_is_bit_identical(setting, place):
    """Weights, gradients, optimizer state and generators are those of the bare loop, for all pairs of choices."""
    bare = Loop(setting, watched=False, layout=alone(place))
    watched = Loop(setting, watched=True, layout=alone(place))
    assert list(differences(bare.run(STEPS), watched.run(STEPS))) == []
    assert STEPS - bare.overflows <= watched.steps_seen() <= STEPS

"""In one process: every model, optimizer, precision and way of watching, in all their triples."""

import pytest

from tests.support.state import differences

from .loop import STEPS, Loop
from .params import every_row
from .settings import SETTINGS


@pytest.mark.parametrize("setting", every_row(SETTINGS))
def test_a_watched_training_is_bit_identical(setting):
    """Weights, gradients, buffers, optimizer state and generators after twelve steps are those of the bare loop."""
    bare, watched = Loop(setting, watched=False), Loop(setting, watched=True)
    assert list(differences(bare.run(), watched.run())) == []
    assert STEPS - bare.overflows <= watched.steps_seen() <= STEPS

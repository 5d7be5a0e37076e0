"""Under torch.compile a watched training is bit-identical too, whichever of the modules is watched."""

import pytest
import torch

from tests.support.state import differences

from .layouts import Layout
from .loop import STEPS, Loop
from .params import every_row

# Dynamo says so of itself, with Python 3.13.0.
pytestmark = pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")

SETTINGS = [
    {"model": "mlp", "optimizer": "AdamW_fused", "watching": "named"},
    {"model": "mlp", "optimizer": "SAM", "watching": "found", "watched": "module"},
    {"model": "cnn", "optimizer": "SGD", "micro_batches": "3", "watching": "statistics"},
    {"model": "transformer", "optimizer": "Adam", "precision": "autocast_bf16", "own_clip": "clip"},
    {"model": "frozen", "optimizer": "LBFGS", "zeroing": "to_zero", "watched": "module"},
    {"model": "checkpoint", "optimizer": "RMSprop", "watching": "found_statistics"},
]


def _compiled(backend):
    def wrap(model):
        torch.compiler.reset()
        compiled = torch.compile(model, backend=backend)
        object.__setattr__(compiled, "module", model)
        return compiled

    return Layout(1, wrap)


def _check(setting, backend):
    layout = _compiled(backend)
    bare = Loop(setting, watched=False, layout=layout).run()
    watched = Loop(setting, watched=True, layout=layout)
    assert list(differences(bare, watched.run())) == []
    assert watched.steps_seen() == STEPS


@pytest.mark.parametrize("setting", every_row(SETTINGS))
def test_a_watched_training_of_a_compiled_model_is_bit_identical(setting):
    """A model compiled with the "aot_eager" backend trains as without a watcher, to the last bit."""
    _check(setting, "aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # inductor's own imports
def test_a_watched_training_with_inductor_is_bit_identical():
    """So does one that inductor made C++ of."""
    _check(SETTINGS[0], "inductor")

"""What the triples leave out: rarer optimizers, models in two dtypes, all ways of watching."""

from itertools import product

import pytest

from tests.support.optimizers import CLOSURES, RARER, RARER_WITH_A_CLOSURE
from tests.support.options import OPTIONS
from tests.support.places import HOST
from tests.support.state import differences

from .layouts import alone
from .loop import Loop
from .params import every_row

STEPS = 5


def _rows(**axes):
    """Return the parameters of all combinations."""
    return every_row([dict(zip(axes, row, strict=True)) for row in product(*axes.values())])


def _check(setting, place, **options):
    layout = alone(place)
    bare = Loop(setting, watched=False, layout=layout)
    watched = Loop(setting, watched=True, layout=layout, **options)
    assert list(differences(bare.run(STEPS), watched.run(STEPS))) == []
    assert watched.steps_seen() == STEPS


@pytest.mark.parametrize(
    "setting",
    _rows(optimizer=[*RARER, *RARER_WITH_A_CLOSURE], watching=["named", "found"]),
)
def test_a_rarer_optimizer_trains_alike(setting, machine):
    """State and returned losses of every other optimizer of torch, told or found, are those of the bare loop."""
    _check(setting, machine)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("optimizer", ["AdamW", *CLOSURES])
@pytest.mark.parametrize("options", OPTIONS)
def test_no_way_of_watching_changes_the_training(options, optimizer):
    """Sinks, failing sinks, statistics, limits and an infinite clip leave a run as it is, closure or not."""
    _check({"optimizer": optimizer}, HOST, **OPTIONS[options]())


@pytest.mark.parametrize(
    "setting",
    _rows(
        model=["mixed"],
        precision=["own"],
        watching=["statistics"],
        micro_batches=["1", "4"],
        zeroing=["to_none", "to_zero"],
    ),
)
def test_a_model_in_two_dtypes_trains_alike(setting, machine):
    """So does a model of float32 and bfloat16, accumulated or not, gradients dropped or zeroed."""
    _check(setting, machine)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of torch's Adagrad
@pytest.mark.parametrize(
    "setting",
    [
        *_rows(model=["all_sparse"], optimizer=["SparseAdam"], micro_batches=["1", "3"],
               watching=["named", "statistics"]),
        *_rows(model=["sparse"], optimizer=["SGD_bare", "Adagrad"], micro_batches=["1", "3"],
               watching=["named", "statistics"]),
    ],
)  # fmt: skip
def test_sparse_gradients_are_left_alike(setting):
    """So do embeddings with sparse gradients, coalesced or not, under every optimizer that takes them."""
    _check(setting, HOST)

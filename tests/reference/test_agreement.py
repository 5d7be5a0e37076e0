"""The comparison that the reference rests on sees one wrong number, wherever it is."""

import copy

import pytest

from tests.neutrality.layouts import ALONE

from .agreement import disagreements
from .taught import train

SETTING = {"own_clip": "watch_clip", "micro_batches": "3"}
WRONG = {
    "number": lambda row: {"number": 1},
    "grad_norm": lambda row: {"grad_norm": row["grad_norm"] * 1.001},
    "grad_norm_clipped": lambda row: {"grad_norm_clipped": row["grad_norm_clipped"] * 1.001},
    "clip_coef": lambda row: {"clip_coef": row["clip_coef"] * 1.001},
    "clip_threshold": lambda row: {"clip_threshold": row["clip_threshold"] * 1.001},
    "clipped": lambda row: {"clipped": not row["clipped"]},
    "outcome": lambda row: {"outcome": "skipped_nonfinite"},
    "micro_batches": lambda row: {"micro_batches": 1},
    "loss_scale": lambda row: {"loss_scale": 2.0},
    "grad_norm_local": lambda row: {"grad_norm_local": row["grad_norm"]},
    "parameters": lambda row: {"parameters": {n: 1.001 * v for n, v in row["parameters"].items()}},
    "a parameter": lambda row: {"parameters": {"0.weight": row["parameters"]["0.weight"]}},
    "clipped_parameters": lambda row: {"clipped_parameters": row["parameters"]},
}


@pytest.fixture(scope="module")
def seen():
    """A training, recorded as it was."""
    return train(SETTING, ALONE, 4)


def test_a_true_record_agrees(seen):
    """A record with the norms of the float64 model disagrees nowhere."""
    assert disagreements(SETTING, seen) == []


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_number_is_told(seen, what):
    """A number of the third step that is off by a thousandth, or a wrong word, is told."""
    wrong = copy.deepcopy(seen)
    wrong["recorded"][2].update(WRONG[what](wrong["recorded"][2]))
    assert disagreements(SETTING, wrong)


def test_a_missing_step_is_told(seen):
    """A step that nobody recorded is told."""
    assert disagreements(SETTING, {**seen, "recorded": seen["recorded"][:-1]})

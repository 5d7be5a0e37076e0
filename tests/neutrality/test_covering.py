"""The settings that are trained cover what they say they cover."""

from itertools import combinations, product

import pytest

from .covering import covering_array, possible
from .loop import STEPS, Loop
from .settings import AXES, FORBIDDEN, SETTINGS

SMALL = {"a": ["1", "2", "3"], "b": ["1", "2", "3"], "c": ["1", "2"], "d": ["1", "2"]}


def _covered(rows, names, choices):
    return any(all(row[n] == c for n, c in zip(names, choices, strict=True)) for row in rows)


@pytest.mark.parametrize("strength", [1, 2, 3, 4])
def test_every_combination_occurs(strength):
    """Every combination of that many choices is in some row, and no row is there twice."""
    rows = covering_array(SMALL, strength=strength)
    for names in combinations(SMALL, strength):
        for choices in product(*(SMALL[name] for name in names)):
            assert _covered(rows, names, choices)
    assert len({tuple(row.items()) for row in rows}) == len(rows)


def test_a_scaler_overflows_and_grows_again_in_the_steps_that_are_trained():
    """The trainings are long enough for what a GradScaler does, and for a step after it."""
    loop, seen = Loop({"precision": "autocast_fp16"}, watched=False), []
    for step in range(STEPS - 1):
        before = loop.scaler.get_scale()
        loop.step(step)
        seen.append(loop.scaler.get_scale() - before)
    assert min(seen) < 0 < max(seen)


def test_pairs_need_few_rows():
    """Pairs are covered by far fewer rows than the full product has."""
    assert 9 <= len(covering_array(SMALL)) <= 12


def test_forbidden_combinations_do_not_occur_and_the_rest_does():
    """A forbidden pair is in no row; every pair of some possible setting is in one."""
    forbidden = [{"a": ["1"], "b": ["1", "2"]}, {"b": ["3"], "c": ["1"]}, {"c": ["2"], "d": ["2"]}]
    rows = covering_array(SMALL, forbidden)
    everything = [dict(zip(SMALL, choices, strict=True)) for choices in product(*SMALL.values())]
    settings = [row for row in everything if possible(row, forbidden)]
    assert all(row in settings for row in rows)
    for names in combinations(SMALL, 2):
        for setting in settings:
            assert _covered(rows, names, [setting[name] for name in names])


def test_the_settings_of_one_process_cover_every_possible_triple():
    """Every three choices that some possible setting has occur together in one that is trained."""
    covered = {part for row in SETTINGS for part in combinations(row.items(), 3)}
    whole = [dict(zip(AXES, choices, strict=True)) for choices in product(*AXES.values())]
    settings = [row for row in whole if possible(row, FORBIDDEN)]
    assert {part for row in settings for part in combinations(row.items(), 3)} == covered

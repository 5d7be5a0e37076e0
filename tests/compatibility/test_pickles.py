"""Pickles of the version before the modules were moved."""

import copy
import json
import pickle
import sys

import pytest

import gradwatch
import gradwatch.testing

from .answers import DATA, expected
from .pickles import held_by, in_folder
from .told import differences

EXPECTED = expected("pickles.json")
REL = 1e-9
LOSSES = {
    "GradientMonitor": (
        (2.6616157610992657 + 0.9119265606559379) / 2,
        (1.0065301462593863 + 1.8784688703899293) / 2,
    ),
    "GradientMonitorFresh": (
        (2.8503726727232355 + 0.960632383148638) / 2,
        (1.1808774729741554 + 2.163314774977646) / 2,
    ),
}
"""What `training_step` returned in the two steps of two batches. The column `loss` is their mean
today; it was the half of the second."""

for _monitor, _losses in LOSSES.items():
    _columns = EXPECTED[_monitor]["does"]["steps"]["columns"]
    next(one for one in _columns if one["name"] == "loss")["values"][4:] = _losses
POSIX_ONLY = ("History", "RunFolder")
"""What holds a path, which another kind of system does not load."""


def _name(name):
    marks = [pytest.mark.skipif(sys.platform == "win32", reason="a POSIX path is in it")]
    return pytest.param(name, marks=marks if name in POSIX_ONLY else [])


@pytest.fixture(autouse=True)
def _folder():
    """Works where the run is whose history was pickled."""
    with in_folder(DATA / "folders"):
        yield


def load(name):
    """Loads one of the files."""
    return pickle.loads((DATA / "pickles" / f"{name}.pickle").read_bytes())


def found_in(name, value):
    """What an object holds, as it comes back from JSON; its repr without fields added since."""
    held = json.loads(json.dumps(held_by(name, value)))
    before = EXPECTED[name].get("repr", "")
    if name in ("StepRecord", "Thresholds") and held["repr"].startswith(before[:-1]):
        held["repr"] = before
    return held


@pytest.mark.parametrize("name", [_name(name) for name in sorted(EXPECTED)])
def test_an_object_holds_and_does_what_it_did(name):
    """An object of an old pickle holds what it held, and does next what it would have done."""
    assert not differences(found_in(name, load(name)), EXPECTED[name], REL)


@pytest.mark.parametrize("name", [_name(name) for name in sorted(EXPECTED)])
def test_an_object_is_pickled_again(name):
    """What was loaded from an old pickle can be pickled and copied, and both are the same still."""
    again = pickle.loads(pickle.dumps(load(name)))
    assert not differences(found_in(name, again), EXPECTED[name], REL)
    assert not differences(found_in(name, copy.deepcopy(load(name))), EXPECTED[name], REL)


def test_the_classes_are_those_of_today():
    """A class that was pickled by name is the very class that is imported now."""
    classes = load("classes")
    for module in (gradwatch, gradwatch.testing):
        for name in module.__all__:
            if name in classes:
                assert classes[name] is getattr(module, name)


@pytest.mark.parametrize("name", sorted(set(gradwatch.__all__) & set(EXPECTED)))
def test_the_class_of_an_object_is_the_public_one(name):
    """An object of an old pickle passes isinstance() with the class that is imported now."""
    assert isinstance(load(name), getattr(gradwatch, name))


def test_every_file_is_looked_at():
    """There is an expectation for each file, and a file for each expectation."""
    assert {file.stem for file in (DATA / "pickles").iterdir()} == set(EXPECTED)

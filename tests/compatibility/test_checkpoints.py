"""Checkpoints of the version before the modules were moved."""

import copy
import json

import pytest
import torch

from .answers import DATA, expected
from .checkpoints import clip_policies, kept, load, resume
from .told import differences, told

EXPECTED = expected("checkpoints.json")
REL = 1e-5


@pytest.fixture(scope="module")
def saved():
    """What the file holds."""
    return load(DATA)


@pytest.mark.parametrize("whole", [False, True], ids=["fresh_policy", "policy_of_the_file"])
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_training_goes_on_as_before(saved, name, whole):
    """The next steps of a resumed training have the numbers that they would have had."""
    steps = resume(copy.deepcopy(saved[name]), name, whole=whole)
    assert not differences(steps, EXPECTED[name]["steps"], REL)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_the_objects_in_the_file_are_what_they_were(name):
    """Policies, records, events, noise scales and reports in a checkpoint hold what they held."""
    found = json.loads(json.dumps(told(kept(DATA, name))))
    assert not differences(found, EXPECTED[name]["kept"])


def test_the_state_of_a_watcher_needs_no_class_of_ours(saved, tmp_path):
    """What state_dict() gave loads with `weights_only=True`."""
    states = {name: one["watcher"] for name, one in saved.items()}
    torch.save(states, tmp_path / "states.pt")
    assert torch.load(tmp_path / "states.pt", weights_only=True) == states


def test_a_state_that_is_saved_now_has_the_same_keys(saved):
    """state_dict() of a run that was resumed has the keys that the file has, and at most new ones."""
    for name in clip_policies():
        old = saved[name]["watcher"]
        new = resume(copy.deepcopy(saved[name]), name, whole=False, give="state")
        assert not _lost(old, new)


def _lost(old, new):
    """Return the keys of a state that a later one does not have."""
    if not isinstance(old, dict):
        return []
    inner = [key for name in old.keys() & new.keys() for key in _lost(old[name], new[name])]
    return [*(old.keys() - new.keys()), *inner]

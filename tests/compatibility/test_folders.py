"""Run folders of the version before the modules were moved."""

import json
import shutil

import numpy as np
import pytest
import torch

import gradwatch
from gradwatch.testing import LinearModel

from .answers import DATA, expected, history_answers, without_words
from .told import differences

EXPECTED = expected("folders.json")
COMPUTED = {"flow", "clip_rate", "report_data"}
"""What is computed from the numbers in the files, by functions that may round otherwise."""


@pytest.fixture(params=sorted(EXPECTED))
def run(request, tmp_path):
    """A copy of a run folder, and what it answered."""
    shutil.copytree(DATA / "folders" / request.param, tmp_path / "run")
    return tmp_path / "run", EXPECTED[request.param]


def test_a_history_answers_as_before(run):
    """steps(), parameters(), events(), flow(), advice and the findings of a loaded run are as they were."""
    path, expected = run
    found = without_words(json.loads(json.dumps(history_answers(gradwatch.load(path)))))
    assert list(found) == list(expected)
    # A column that is new: it says whose a row is, where there are several optimizers.
    parameters = found["parameters"]["columns"]
    found["parameters"]["columns"] = [one for one in parameters if one["name"] != "optimizer"]
    for name, one in without_words(expected).items():
        assert not differences(found[name], one, 1e-12 if name in COMPUTED else 0.0, name)


def test_nothing_in_the_folder_is_changed_by_reading(run):
    """Reading leaves every file as it was."""
    path, _ = run
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    history_answers(gradwatch.load(path))
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_a_run_is_resumed_in_it(run):
    """A new session goes on with the run: its steps replace those from its first one on."""
    path, _ = run
    before = gradwatch.load(path).steps()[lambda frame: frame["optimizer"] == "SGD"]
    model = LinearModel([3.0, 4.0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watcher = gradwatch.watch(model, optimizer, run_dir=path)
    watcher.load_state_dict({**watcher.state_dict(), "steps": {"SGD": 8}})
    with watcher:
        model().backward()
        optimizer.step()
    after = gradwatch.load(path)
    steps = after.steps()[lambda frame: frame["optimizer"] == "SGD"]
    assert steps.index.tolist() == list(range(1, 10))
    np.testing.assert_array_equal(steps["grad_norm"], [*before["grad_norm"][:8], 5.0])
    assert after.names == ("weight", "0.weight", "0.bias", "2.weight", "2.bias")

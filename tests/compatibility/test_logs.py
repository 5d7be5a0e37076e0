"""A TensorBoard log of the version before the modules were moved."""

import json
import shutil

import pytest

from .answers import DATA, expected
from .boards import NEUTRAL_NAME, answers_of, write_log
from .told import differences

EXPECTED = expected("logs.json")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What is read of a copy of the log."""
    folder = tmp_path_factory.mktemp("logs") / "logs"
    shutil.copytree(DATA / "logs", folder)
    return json.loads(json.dumps(answers_of(folder)))


@pytest.fixture(scope="module")
def anew(tmp_path_factory):
    """What is read of a log of the same training that is written now."""
    folder = tmp_path_factory.mktemp("anew") / "logs"
    with pytest.MonkeyPatch.context() as patch:
        # On a slow machine the records come in other portions, and so in other chunks.
        patch.setattr("time.perf_counter", lambda: 0.0)
        write_log(folder / "run")
    assert [file.name for file in (folder / "run").iterdir()] == [NEUTRAL_NAME]
    return json.loads(json.dumps(answers_of(folder)))


@pytest.mark.parametrize("kind", ["scalars", "tensors"])
def test_tensorboard_reads_the_same(found, kind):
    """TensorBoard reads every tag, step and value of the old log."""
    assert not differences(found["tags"][kind], EXPECTED["tags"][kind])


@pytest.mark.parametrize("part", sorted(EXPECTED["tab"]))
def test_the_gradients_tab_answers_the_same(found, part):
    """The Gradients tab answers about the old log as it did."""
    assert not differences(found["tab"][part], EXPECTED["tab"][part])


def test_the_same_training_writes_the_same_scalars(anew):
    """A log that is written now has the tags, steps and values of the old one."""
    assert not differences(anew["tags"]["scalars"], EXPECTED["tags"]["scalars"], 1e-5)


def test_the_same_training_has_the_same_tab(anew):
    """The Gradients tab answers about a log that is written now as about the old one."""
    for optimizer in ("SGD", "Adam"):
        parts = anew["tab"][optimizer], EXPECTED["tab"][optimizer]
        layouts = [part["layout"] for part in parts]
        norms = [part["heatmap"]["norms"] for part in parts]
        assert not differences(*layouts)
        assert not differences(*norms, 1e-5)


def test_the_names_of_the_tags_of_the_tab_have_the_same_form(anew):
    """But for the session's own number, tags that are written now are named as the old ones."""

    def forms(tags):
        return [["*" if len(part) > 11 else part for part in tag.split("/")] for tag in tags]

    assert forms(anew["tags"]["tensors"]) == forms(EXPECTED["tags"]["tensors"])

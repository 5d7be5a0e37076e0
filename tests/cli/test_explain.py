"""`gradwatch explain`."""

import json

import pytest
import torch

from gradwatch.record.explanation import Explanation
from gradwatch.record.folder.explanations import ExplanationStore
from tests.support import processes
from tests.support.explanations import call, explanation

from .runs import HOSTILE, batch, write


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run in the folder `run`; returns what adds an explanation to it."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "run", batch(range(1, 200)))
    return ExplanationStore("run").write


def test_prints_the_paragraph_of_each(command, run):
    """The text is that of the explanations, in the order of the steps."""
    later, earlier = explanation(150, operation="sqrt"), explanation(120)
    run(later)
    run(earlier)
    assert command("explain", "run") == (0, f"{earlier}\n\n{later}\n", "")


def test_of_one_step(command, run):
    """--step leaves the others out, and names those that there are if it has none."""
    for step in (*range(10, 22), 150):
        run(explanation(step))
    assert command("explain", "run", "--step", "150").out == f"{explanation(150)}\n"
    ran = command("explain", "run", "--step", "149")
    assert ran.code == 0
    assert "no explanation of step 149" in ran.out
    assert "steps 10, 11, 12, 13, 14, 15, 16, 17, 18, 19 and 3 more" in ran.out


@pytest.mark.parametrize("step", ["0", "-1", "x", "1.5"])
def test_a_step_that_is_none_is_an_error(command, run, step):
    """Steps count from 1."""
    ran = command("explain", "run", "--step", step)
    assert ran.code == 2
    assert "--step" in ran.err


def test_a_run_without_any_says_how_to_get_some(command, run):
    """That is no error: the run may be healthy."""
    ran = command("explain", "run")
    assert ran.code == 0
    assert "run has no explanations" in ran.out
    assert 'on_nonfinite="explain"' in ran.out


def test_names_the_file_of_the_batch(command, run):
    """Where the micro-batch was kept, its file is named, or why it was not."""
    kept = run(explanation(120), [call(torch.ones(1))])
    assert command("explain", "run").out.endswith(f"\nThe micro-batch is in {kept / 'batch.pt'}.\n")
    ExplanationStore("run", most_bytes=3).write(explanation(121), [call(torch.ones(1))])
    text = command("explain", "run", "--step", "121").out
    assert "The micro-batch was not kept: its tensors take more than" in text


def test_json_holds_all_fields(command, run):
    """All fields of the explanation are there, with its line, its folder and the batch."""
    run(explanation(120), [call(torch.ones(1))])
    run(explanation(121))
    ran = command("explain", "run", "--json")
    content = json.loads(ran.out, parse_constant=pytest.fail)
    assert content["run"] == "run"
    first, second = content["explanations"]
    assert set(first) == set(Explanation().as_dict()) | {"summary", "folder", "batch"}
    assert (first["step"], first["line"], first["examples"]) == (120, 42, [3, 17])
    assert first["summary"] == explanation(120).summary
    assert first["inputs"][0]["low"] is None
    assert first["folder"] == "run/nonfinite/step-000120"
    assert first["batch"] == "run/nonfinite/step-000120/batch.pt"
    assert second["batch"] is None
    empty = command("explain", "run", "--json", "--step", "9").out
    assert json.loads(empty)["explanations"] == []


def test_a_run_that_wrote_no_step(command, tmp_path, monkeypatch):
    """A process that was killed before its first delivery has left its explanation."""
    monkeypatch.chdir(tmp_path)
    ExplanationStore("killed").write(explanation(3))
    assert command("explain", "killed").out == f"{explanation(3)}\n"


@pytest.mark.parametrize("name", HOSTILE)
def test_text_from_the_run_is_shown_escaped(command, run, name):
    """Names, paths and source lines do nothing to the terminal."""
    run(explanation(module=name, module_class=name, file=name, source=name, argument=name))
    ran = command("explain", "run")
    assert ran.code == 0
    assert ran.out.replace("\n", "").isprintable()


def test_as_a_process(run, tmp_path):
    """`python -m gradwatch explain` prints it on a stream of bytes."""
    run(explanation())
    ran = processes.run("-m", "gradwatch", "explain", "run", cwd=tmp_path)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"{explanation()}\n", "")


def test_tail_waits_for_a_run_that_has_only_an_explanation(tmp_path):
    """What is written before the first steps does not make tail believe that it is no run."""
    from gradwatch.cli.tail import _may_begin

    ExplanationStore(tmp_path).write(explanation(1))
    assert _may_begin(tmp_path, wait=False)

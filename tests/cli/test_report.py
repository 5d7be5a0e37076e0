"""`gradwatch report`."""

import json

import pytest

from gradwatch.history import load
from gradwatch.report import KINDS

from .runs import write


def test_prints_the_report_of_the_history(command, runs):
    """The text is that of the report."""
    assert command("report", "sick").out == f"{load('sick').report()}\n"


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ("nan", 1),
        ("exploding,nan", 1),
        (" exploding , nan ", 1),
        ("any", 1),
        ("warning,critical", 1),
        ("exploding", 0),
        ("inf", 0),
    ],
)
def test_fails_on_what_is_named(command, runs, given, code):
    """The exit code is 1 exactly if one of the named kinds or severities was found."""
    ran = command("report", "sick", "--fail-on", given)
    assert ran.code == code
    assert ("Failed on: " in ran.out) == bool(code)


def test_fail_on_can_be_given_twice(command, runs):
    """Several --fail-on add up."""
    assert command("report", "sick", "--fail-on", "exploding", "--fail-on", "nan").code == 1


@pytest.mark.parametrize("given", ["nam", "", "nan,,inf"])
def test_a_name_that_is_none_lets_no_run_pass(command, runs, given):
    """A misspelt kind is an error, and the known ones are listed."""
    ran = command("report", "good", "--fail-on", given)
    assert ran.code == 2
    assert all(kind in ran.err for kind in KINDS)


def test_a_name_like_another_is_suggested(command, runs):
    """A misspelt kind is answered with the one that was meant."""
    assert "Did you mean 'exploding'?" in command("report", "good", "--fail-on", "explodng").err


def test_json_has_findings_and_what_it_failed_on(command, runs):
    """The JSON is that of the report, with the run and the kinds that it failed on."""
    ran = command("report", "sick", "--fail-on", "nan,inf", "--json")
    content = json.loads(ran.out)
    assert ran.code == 1
    assert content["run"] == "sick"
    assert content["failed_on"] == ["nan"]
    assert "nan" in [finding["kind"] for finding in content["findings"]]
    assert content["steps"] == 120


def test_a_run_without_steps_has_nothing_to_fail_on(command, tmp_path):
    """A run that has just begun gets a report without findings."""
    write(tmp_path / "run", *[])
    (tmp_path / "run").mkdir(exist_ok=True)
    for table in ("steps", "parameters", "events"):
        (tmp_path / "run" / table).mkdir()
    (tmp_path / "run" / "meta.json").write_text(
        '{"format": "gradwatch run", "version": 1, "sessions": [], '
        '"layout": {"names": ["a"], "modules": [""], "shapes": [[2]], "aliases": [[]]}}',
        encoding="utf-8",
    )
    ran = command("report", tmp_path / "run", "--fail-on", "any")
    assert (ran.code, ran.err) == (0, "")
    assert "0 steps" in ran.out

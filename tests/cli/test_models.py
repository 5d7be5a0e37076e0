"""The commands on a folder with several models, as `gradwatch run` writes it."""

import io
import json
from dataclasses import replace

import pytest

from gradwatch.cli import tail
from gradwatch.cli.follower import Follower
from gradwatch.cli.terminal import Output
from gradwatch.record.explanation import Explanation
from gradwatch.record.folder.explanations import ExplanationStore
from gradwatch.record.folder.models import ModelFolder

from .runs import batch, nan_at


def write(folder, *batches, close=True):
    """Write the run of a model."""
    sink = ModelFolder(folder)
    for one in batches:
        sink.write(one)
    if close:
        sink.close()
    return sink


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Write `a` with the models D and G, and `one` with Net; we are beside them."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a" / "D", batch([1, 2, 3]))
    bad = batch([1, 2], events=[nan_at(2)])
    steps = [bad.steps[0], replace(bad.steps[1], nonfinite_parameters=1)]
    write(tmp_path / "a" / "G", replace(bad, steps=steps))
    write(tmp_path / "one" / "Net", batch([1, 2, 3, 4]))
    return tmp_path


class TestReport:
    def test_each_model_has_its_report_under_its_name(self, command, models):
        """In the order of first steps; also where there is one."""
        lines = command("report", "a").out.splitlines()
        assert lines[:2] == ["D", "="]
        assert lines[2].startswith("gradwatch report: 3 steps")
        place = lines.index("G")
        assert lines[place - 1 : place + 2] == ["", "G", "="]
        assert command("report", "one").out.startswith("Net\n===\ngradwatch report: 4 steps")

    def test_json_has_a_part_for_each(self, command, models):
        """With the name of the model and the folder to read on in."""
        told = json.loads(command("report", "a", "--json").out)
        assert told["run"] == "a"
        parts = [(one["model"], one["run"], one["steps"]) for one in told["models"]]
        assert parts == [("D", "a/D", 3), ("G", "a/G", 2)]
        assert [
            one["model"] for one in json.loads(command("report", "one", "--json").out)["models"]
        ]

    def test_one_finding_of_any_model_fails(self, command, models):
        """The exit code is for all of them."""
        assert command("report", "a").code == 0
        assert command("report", "a", "--fail-on", "nan").code == 1
        assert command("report", "a/D", "--fail-on", "nan").code == 0
        told = json.loads(command("report", "a", "--fail-on", "nan", "--json").out)
        assert [one["failed_on"] for one in told["models"]] == [[], ["nan"]]

    def test_a_run_folder_is_told_as_ever(self, command, models):
        """Without a heading, and without `models`."""
        assert command("report", "a/D").out.startswith("gradwatch report: 3 steps")
        assert "models" not in json.loads(command("report", "a/D", "--json").out)


class TestExplain:
    def test_each_model_has_its_explanations(self, command, models):
        """A model without one says so."""
        ExplanationStore("a/G").write(Explanation(origin="not_found", step=2, notes=("Why.",)))
        out = command("explain", "a").out
        assert out.startswith("D\n=\na/D has no explanations.")
        assert "\n\nG\n=\nNaN in " in out
        told = json.loads(command("explain", "a", "--json").out)["models"]
        assert [(one["model"], len(one["explanations"])) for one in told] == [("D", 0), ("G", 1)]

    def test_also_before_the_first_steps_are_written(self, command, models):
        """A process that was killed has left them."""
        folder = ModelFolder(models / "killed" / "Net").claim()
        assert command("explain", "killed").code == 2
        ExplanationStore(folder).write(Explanation(origin="not_found", step=1))
        assert command("explain", "killed").out.startswith("Net\n===\nNaN in ")


class TestTail:
    def test_all_models_are_shown_in_turn(self, command, models):
        """Each line begins with the name of its model."""
        lines = command("tail", "a", "--once").out.splitlines()
        assert [line.split()[:3] for line in lines if "norm" in line] == [
            [model, "step", str(step)]
            for model, last in (("D", 3), ("G", 2))
            for step in range(1, last + 1)
        ]
        assert not command("tail", "one", "--once").out.startswith("Net")

    def test_json_names_the_model(self, command, models):
        """Also where there is one; a run folder has no such field."""
        for run, expected in (("a", "DDDGGG"), ("one", ["Net"] * 4), ("a/D", [None] * 3)):
            lines = command("tail", run, "--once", "--json").out.splitlines()
            assert [json.loads(line).get("model") for line in lines] == list(expected)

    def test_waits_for_the_first_model_and_sees_those_that_come_later(
        self, command, tmp_path, monkeypatch
    ):
        """A program has reserved its folder, then steps one model, then another."""
        (tmp_path / "a").mkdir()
        steps = iter(
            [
                ModelFolder(tmp_path / "a" / "D").claim,
                lambda: write(tmp_path / "a" / "D", batch([1, 2])),
                lambda: write(tmp_path / "a" / "G", batch([1])),
            ]
        )

        def sleep(_):
            act = next(steps, None)
            if act is None:
                raise KeyboardInterrupt
            act()

        monkeypatch.setattr("gradwatch.cli.tail.time.sleep", sleep)
        ran = command("tail", tmp_path / "a", "--json")
        assert ran.code == 0
        seen = [json.loads(line) for line in ran.out.splitlines()]
        assert [(one["model"], one["step"]) for one in seen] == [("D", 1), ("D", 2), ("G", 1)]

    @pytest.mark.parametrize(("count", "height", "tables"), [(2, 40, 2), (2, 24, 0), (30, 24, 0)])
    def test_models_share_the_screen(self, tmp_path, count, height, tables):
        """With a table each where there is room; of many, those that train are shown."""
        console = pytest.importorskip("rich.console", reason="gradwatch[runs] installs it")
        from gradwatch.cli.screen import Screen

        looks = {}
        for number in range(count):
            write(tmp_path / f"Net-{number}", batch(range(1, 200), events=[nan_at(3)]))
            follower = Follower(tmp_path / f"Net-{number}")
            looks[f"Net-{number}"] = follower, follower.look()
        view, shown = Screen(Output(None), "run", 10), io.StringIO()
        view._console = console.Console(file=shown, width=80, height=height, color_system=None)
        view._console.print(*view._all_parts(looks), sep="\n")
        lines = shown.getvalue().rstrip().splitlines()
        assert len(lines) <= height
        assert f"Net-{count - 1}  step 199" in lines
        assert (
            sum("step" in line and "lr" not in line and "norm" in line for line in lines) == tables
        )
        assert lines[-1].strip() == "Ctrl-C ends"


class TestOneIsTaken:
    @pytest.mark.parametrize(
        "arguments", [("plot", "-o", "x.png"), ("export", "-o", "x.csv"), ("export",)]
    )
    def test_the_only_model_is_and_several_are_named(self, command, models, arguments):
        """The error has a path to copy."""
        name, *more = arguments
        assert command(name, "one", *more).code == 0
        ran = command(name, "a", *more)
        assert ran.code == 2
        assert ran.err == (
            f"gradwatch {name}: 'a' holds 2 models: D, G. Name one of them, such as 'a/D'.\n"
        )

    def test_files_of_its_run_are_never_overwritten(self, command, models):
        """Also where the folder stands for its only model."""
        ran = command("export", "one", "-o", "one/Net/meta.json", "--format", "json")
        assert ran.code == 2
        assert "is a file of the run itself" in ran.err


class TestCompare:
    def test_the_only_models_are_compared_whatever_they_are_called(self, command, models):
        """And with run folders."""
        told = json.loads(command("compare", "one", "a/D", "--json").out)
        assert told["steps"]["common"] == 3

    def test_models_of_the_same_name_are_compared(self, command, models):
        """Those that only one side has are named."""
        write(models / "b" / "D", batch([1, 2, 3], norm=2.0))
        write(models / "b" / "E", batch([1]))
        out = command("compare", "a", "b").out
        assert out.startswith("D\n=\nA  a/D\nB  b/D\n3 steps in both; they differ from step 1 on")
        assert out.endswith("Models only in A: G\n\nModels only in B: E\n")
        told = json.loads(command("compare", "a", "b", "--json").out)
        assert [one["model"] for one in told["models"]] == ["D"]
        assert (told["only_a"], told["only_b"]) == (["G"], ["E"])

    def test_several_against_one_run_is_an_error(self, command, models):
        """As no name says which; likewise where no name is in both."""
        assert "'a' holds 2 models" in command("compare", "a", "a/D").err
        assert "no model of the same name" in command("compare", "a", "one").err


def test_a_folder_that_merely_holds_runs_is_none(command, models):
    """The error names what is in it."""
    assert "Did you mean 'a' or 'one'?" in command("report", ".").err
    assert tail._may_begin(models / "a", wait=True) is False

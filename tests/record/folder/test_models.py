"""A folder with a run folder for each model of a process."""

import json
import re

import pytest

from gradwatch.errors import GradwatchWarning
from gradwatch.history import load, load_all
from gradwatch.record.folder.meta import MODELS
from gradwatch.record.folder.models import (
    ModelFolder,
    begun_in,
    check_models_folder,
    list_model,
    models_in,
    one_run,
    runs_in,
)
from gradwatch.record.folder.writer import RunFolder

from . import runs
from .test_two_processes import fcntl, writer  # noqa: F401  # fixtures


def write(folder, *batches):
    """Write the run of a model."""
    sink = ModelFolder(folder)
    for one in batches:
        sink.write(one)
    sink.close()


@pytest.fixture
def two(tmp_path):
    """Return a folder with the models B and A; B stepped first, and A was written first."""
    first, second = ModelFolder(tmp_path / "a" / "B"), ModelFolder(tmp_path / "a" / "A")
    first.begin()
    second.write(runs.batch([1, 2, 3]))
    first.write(runs.batch([1, 2]))
    first.close()
    second.close()
    return tmp_path / "a"


class TestMade:
    def test_nothing_is_made_before_the_first_step(self, tmp_path):
        """Neither at once nor with events; and not at the end of a model that never steps."""
        sink = ModelFolder(tmp_path / "a" / "Net")
        sink.write(runs.batch([], events=[runs.event(1)]))
        sink.close()
        assert list(tmp_path.iterdir()) == []

    def test_events_before_the_first_step_are_written_with_it(self, tmp_path):
        """Those of several batches, in their order, and once."""
        sink = ModelFolder(tmp_path / "Net")
        for value in (1.0, 2.0):
            sink.write(runs.batch([], events=[runs.event(1, value=value)]))
        sink.write(runs.batch([1, 2], events=[runs.event(2, value=3.0)]))
        sink.close()
        assert load(tmp_path / "Net").events()["value"].tolist() == [1.0, 2.0, 3.0]
        assert runs.steps_of(tmp_path / "Net") == [1, 2]

    def test_events_of_a_first_step_that_raised_are_written(self, tmp_path):
        """There is no step then, and the model has stepped all the same."""
        sink = ModelFolder(tmp_path / "Net")
        sink.write(runs.batch([], events=[runs.event(1, value=1.0)]))
        sink.begin()
        sink.write(runs.batch([], events=[runs.event(1, value=2.0)]))
        sink.close()
        assert load(tmp_path / "Net").events()["value"].tolist() == [1.0, 2.0]
        assert runs.steps_of(tmp_path / "Net") == []

    def test_many_batches_of_events_are_no_loss(self, tmp_path):
        """A model whose first step comes late has them all."""
        sink = ModelFolder(tmp_path / "Net")
        for _ in range(200):
            sink.write(runs.batch([], events=[runs.event(1)]))
        sink.write(runs.batch([1]))
        sink.close()
        assert len(load(tmp_path / "Net").events()) == 200

    def test_the_folder_can_be_claimed_before_the_steps(self, tmp_path):
        """An explanation is written at once; the steps follow."""
        sink = ModelFolder(tmp_path / "a" / "Net")
        assert sink.claim() == sink.claim() == tmp_path / "a" / "Net"
        assert list(models_in(tmp_path / "a")) == ["Net"]
        assert begun_in(tmp_path / "a") == {}
        sink.write(runs.batch([1]))
        sink.close()
        assert list(begun_in(tmp_path / "a")) == ["Net"]
        assert len((tmp_path / "a" / MODELS).read_text().splitlines()) == 1

    def test_a_run_that_begins_anew_sets_the_earlier_one_aside(self, tmp_path):
        """As in a folder of its own, also if events come first; the list stays as it is."""
        write(tmp_path / "a" / "Net", runs.batch([1, 2, 3]))
        with pytest.warns(GradwatchWarning, match="earlier-1"):
            write(
                tmp_path / "a" / "Net",
                runs.batch([], events=[runs.event(1)]),
                runs.batch([1, 2]),
            )
        assert runs.steps_of(tmp_path / "a") == [1, 2]
        assert runs.steps_of(tmp_path / "a" / "Net" / "earlier-1") == [1, 2, 3]
        assert list(models_in(tmp_path / "a")) == ["Net"]

    def test_a_disk_that_fails_is_tried_again(self, tmp_path, monkeypatch):
        """With one warning; the steps are held until then."""
        (tmp_path / "a").write_text("in the way")
        monkeypatch.setattr("gradwatch.record.folder.writer.RETRY_S", 0.0)
        sink = ModelFolder(tmp_path / "a" / "Net")
        with pytest.warns(GradwatchWarning, match="cannot write to the run folder"):
            sink.write(runs.batch([1]))
        (tmp_path / "a").unlink()
        sink.write(runs.batch([2]))
        sink.close()
        assert runs.steps_of(tmp_path / "a") == [1, 2]


class TestAnotherProcess:
    def test_the_second_writes_beside_it(self, tmp_path, writer):  # noqa: F811
        """With a warning, as a training that is under way must not be stopped."""
        process = writer(folder="Net")
        assert process.stdout.readline() == "writes\n"
        sink = ModelFolder(tmp_path / "Net")
        text = f"another process writes to '{tmp_path}/Net', so this one writes to"
        with pytest.warns(GradwatchWarning, match=re.escape(text)):
            sink.write(runs.batch([1, 2, 3]))
        sink.close()
        assert runs.steps_of(tmp_path / "Net") == [1, 2]
        assert runs.steps_of(sink.path) == [1, 2, 3]
        assert sink.path.name in models_in(tmp_path)
        assert not (sink.path / ".lock").exists()


class TestChecked:
    def test_a_wrong_path_is_refused_at_once(self, tmp_path):
        """A file, a folder in a file, a run folder, no path at all."""
        (tmp_path / "file").touch()
        runs.write(tmp_path / "run", runs.batch([1]))
        for path, told in (
            (tmp_path / "file", "is a file"),
            (tmp_path / "file" / "a", "is a file"),
            (tmp_path / "run", "is the run folder of one model"),
            ("", "empty path"),
        ):
            with pytest.raises(ValueError, match=told):
                check_models_folder(path)
        with pytest.raises(TypeError, match="must be a folder"):
            check_models_folder(3)

    def test_a_new_a_used_and_a_foreign_folder_are_fine(self, tmp_path, two):
        """It may not exist yet, and may hold other things."""
        for path in (tmp_path / "new" / "a", two, tmp_path):
            check_models_folder(path)
        assert not (tmp_path / "new").exists()

    def test_a_run_cannot_be_written_into_a_folder_of_models(self, two):
        """It would hide the models."""
        with pytest.raises(ValueError, match="holds a folder for each model"):
            RunFolder(two)


class TestRead:
    def test_all_models_in_the_order_of_their_first_steps(self, two):
        """By name, as histories."""
        found = load_all(two)
        assert {name: len(history) for name, history in found.items()} == {"B": 2, "A": 3}
        assert list(found) == ["B", "A"]

    def test_several_models_are_named(self, two):
        """The error says how to load one, and how to load all."""
        told = (
            f"{str(two)!r} holds 2 models: B, A. Load one: gradwatch.load({str(two / 'B')!r}). "
            f"Load all: gradwatch.load_all({str(two)!r})."
        )
        with pytest.raises(ValueError, match=re.escape(told)):
            load(two)

    def test_many_models_are_counted(self, tmp_path):
        """Five are named."""
        for number in range(8):
            list_model(tmp_path / f"Net-{number}", float(number))
            runs.write(tmp_path / f"Net-{number}", runs.batch([1]))
        with pytest.raises(ValueError, match=r"holds 8 models: Net-0, .*, Net-4 and 3 more"):
            one_run(tmp_path)

    def test_the_only_model_is_opened(self, tmp_path):
        """The folder stands for it."""
        write(tmp_path / "a" / "Net", runs.batch([1, 2]))
        assert runs.steps_of(tmp_path / "a") == [1, 2]
        assert list(load_all(tmp_path / "a")) == ["Net"]

    def test_a_run_folder_is_that_of_one_model(self, tmp_path):
        """Also for load_all(), under the name of the folder."""
        runs.write(tmp_path / "run", runs.batch([1]))
        runs.write(tmp_path / "run" / "finetune", runs.batch([1, 2]))
        assert {name: len(one) for name, one in load_all(tmp_path / "run").items()} == {"run": 1}
        assert runs.steps_of(tmp_path / "run" / "finetune") == [1, 2]

    def test_a_folder_that_merely_holds_runs_is_none(self, tmp_path):
        """The error names what is in it, folders of models too."""
        runs.write(tmp_path / "x", runs.batch([1]))
        write(tmp_path / "y" / "Net", runs.batch([1]))
        for read in (load, load_all):
            with pytest.raises(ValueError, match=r"Did you mean '.*x' or '.*y'\?"):
                read(tmp_path)

    def test_no_model_has_begun(self, tmp_path):
        """Killed before its first steps were written, or only just begun."""
        ModelFolder(tmp_path / "Net").claim()
        for read in (load, load_all):
            with pytest.raises(ValueError, match="holds no step yet"):
                read(tmp_path)

    def test_a_wrong_argument_is_named(self):
        """As for load()."""
        with pytest.raises(TypeError, match=r"load_all\(path=\) must be a run folder"):
            load_all(3)
        with pytest.raises(FileNotFoundError, match="There is no folder"):
            load_all("nowhere/at/all")


class TestList:
    def test_what_is_no_model_is_left_out(self, two):
        """Broken lines, other content, paths out of the folder, folders that are gone."""
        names = ["../b", "/etc", "..", ".", "", "a\\b", "gone", 3, None]
        with (two / MODELS).open("a") as file:
            for name in names:
                line = {"format": "gradwatch models", "version": 1, "model": name, "time": 0.0}
                file.write(json.dumps(line) + "\n")
            file.write('[1]\n{"format": "x", "model": "A"}\n' + "[" * 100_000 + "\n")
            file.write('{"format": "gradwatch models", "mod')
        assert list(runs_in(two)) == ["B", "A"]

    def test_half_a_line_is_not_continued(self, two):
        """A process was killed while it wrote it."""
        with (two / MODELS).open("a") as file:
            file.write('{"format": "gradw')
        write(two / "C", runs.batch([1]))
        assert list(load_all(two)) == ["B", "A", "C"]

    def test_a_newer_format_is_refused(self, two):
        """With what to do about it."""
        with (two / MODELS).open("a") as file:
            file.write('{"format": "gradwatch models", "version": 2, "model": "C"}\n')
        with pytest.raises(ValueError, match="Upgrade"):
            load_all(two)

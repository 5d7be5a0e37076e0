"""`gradwatch tail`, as far as it goes in one process."""

import io
import json

import pytest

from gradwatch.cli.follower import KEPT, Follower, declared_texts
from gradwatch.cli.lines import Lines
from gradwatch.cli.terminal import Output
from gradwatch.history import load
from gradwatch.record.folder import parts, reader
from gradwatch.record.records import StepRecord

from .runs import batch, nan_at, write


def _steps(ran):
    return [one["step"] for one in map(json.loads, ran.out.splitlines()) if one["type"] == "step"]


class TestOnce:
    def test_shows_the_newest_steps_and_says_what_is_not_shown(self, command, runs):
        """The last ten steps are lines; the others are counted; earlier events come first."""
        lines = command("tail", "sick", "--once").out.splitlines()
        assert lines[0] == "... 110 steps not shown"
        assert lines[1].startswith("  event  step 77  nan: ")
        assert lines[-10].startswith("step      111  norm ")
        assert lines[-1].startswith("step      120  norm ")
        assert len(lines) == 13

    def test_an_event_stands_behind_its_step(self, command, runs):
        """An event of a step that is shown follows it."""
        lines = command("tail", "sick", "--once", "-n", "50").out.splitlines()
        place = next(index for index, line in enumerate(lines) if line.startswith("step       77"))
        assert lines[place].endswith("skipped nonfinite")
        assert lines[place + 1].startswith("  event  step 77  nan: ")

    def test_json_has_a_line_per_step_and_event(self, command, runs):
        """Each line is an object that says what it is."""
        ran = command("tail", "sick", "--once", "-n", "3", "--json")
        lines = list(map(json.loads, ran.out.splitlines()))
        assert [one["type"] for one in lines] == ["step"] * 3 + ["event"] * 2
        assert [one["step"] for one in lines] == [118, 119, 120, 77, 77]

    def test_the_norm_of_all_is_shown_where_optimizers_step_together(self):
        """With one optimizer it would be the norm twice."""
        alone = StepRecord(1, "SGD", grad_norm=3.0, grad_norm_all=3.0)
        joined = StepRecord(1, "SGD", grad_norm=3.0, grad_norm_all=5.0)
        assert declared_texts(alone)["norm of all"] == ""
        assert declared_texts(joined)["norm of all"] == "5"

    def test_a_run_without_steps(self, command, runs):
        """A run that has just begun is no error."""
        (part,) = (runs / "good" / "steps").iterdir()
        part.unlink()
        assert command("tail", "good", "--once") == (0, "good has no steps yet.\n", "")

    def test_waits_for_nothing(self, command, runs):
        """With --once a run that is not there is an error, --wait or not."""
        assert command("tail", "nowhere", "--once", "--wait").code == 2


class TestFollowing:
    def test_sees_each_step_once(self, tmp_path, monkeypatch):
        """Steps come in order, each once, across parts that are merged meanwhile."""
        monkeypatch.setattr(parts, "LEVELS", (8, 64, 512))
        sink = write(tmp_path, batch([1, 2, 3]), close=False)
        follower = Follower(tmp_path)
        seen = [row.step for row in follower.look().rows]
        for first in range(4, 200, 7):
            sink.write(batch(range(first, first + 7), events=[nan_at(first)]))
            if first % 2:
                seen += [row.step for row in follower.look().rows]
        sink.close()
        seen += [row.step for row in follower.look().rows]
        assert seen == load(tmp_path).steps().index.tolist()
        assert follower.event_counts["nan"] == len(load(tmp_path).events())
        assert not follower.look()

    def test_a_resumed_run_replaces_steps_and_events(self, tmp_path):
        """When another process goes on from step 6, the old steps from there on are forgotten."""
        events = [nan_at(3), nan_at(8)]
        write(tmp_path, batch(range(1, 11), events=events), close=False)
        follower = Follower(tmp_path)
        assert follower.look().rows[-1].step == 10
        write(tmp_path, batch(range(6, 9), events=[nan_at(7)]), close=False)
        new = follower.look()
        assert new.resumed
        assert [row.step for row in new.rows] == [6, 7, 8]
        assert [row.step for row in follower.rows] == load(tmp_path).steps().index.tolist()
        assert [one.step for one in follower.events] == [3, 7]

    def test_resumed_twice_between_two_looks(self, tmp_path):
        """Steps that the first of two new processes has replaced are forgotten too."""
        write(tmp_path, batch(range(1, 11)), close=False)
        follower = Follower(tmp_path)
        follower.look()
        write(tmp_path, batch(range(4, 10)), close=False)
        write(tmp_path, batch(range(8, 10)), close=False)
        assert follower.look().resumed
        assert [row.step for row in follower.rows] == load(tmp_path).steps().index.tolist()

    def test_begins_with_what_is_valid(self, tmp_path):
        """Of a run that was resumed, the first look has the steps and events of the History."""
        write(tmp_path, batch(range(1, 11), events=[nan_at(8)]), close=False)
        write(tmp_path, batch(range(6, 9), events=[nan_at(6)]), close=False)
        follower = Follower(tmp_path)
        follower.look()
        assert [row.step for row in follower.rows] == load(tmp_path).steps().index.tolist()
        assert [one.step for one in follower.events] == load(tmp_path).events().step.tolist()

    def test_an_event_waits_for_its_step(self, tmp_path):
        """An event whose steps are not written yet is shown with them, and a torn line never."""
        sink = write(tmp_path, batch([1]), close=False)
        (log,) = (tmp_path / "events").iterdir()
        follower = Follower(tmp_path)
        follower.look()
        sink.write(batch([2], events=[nan_at(2)]))
        (part,) = (one for one in (tmp_path / "steps").iterdir() if one.name.endswith("1.parquet"))
        hidden = part.rename(tmp_path / "hidden")
        assert not follower.look()
        hidden.rename(part)
        with log.open("ab") as file:
            file.write(b'{"step": 3, "ki')
        assert [one.step for one in follower.look().events] == [2]

    def test_memory_does_not_grow_with_the_run(self, tmp_path, monkeypatch):
        """What is kept is bounded, and of a long run only the last row groups are read."""
        sink = write(tmp_path, close=False)
        for first in range(1, 5001, 500):
            events = [nan_at(step) for step in range(first, first + 500)]
            sink.write(batch(range(first, first + 500), events=events))
        opened = []
        real = reader.open_parquet
        monkeypatch.setattr(
            reader,
            "open_parquet",
            lambda path, names: opened.append(path) or real(path, names),
        )
        follower = Follower(tmp_path)
        new = follower.look()
        assert len(opened) < len(list((tmp_path / "steps").iterdir()))
        assert len(follower.rows) == KEPT
        assert new.left_out == 5000 - KEPT
        assert len(follower.events) == 64
        assert follower.event_counts["nan"] == 5000

    def test_a_run_that_is_deleted_ends_it(self, command, runs, monkeypatch):
        """A folder that goes away while it is followed is an error in one line."""

        def delete(_):
            (runs / "good" / "meta.json").unlink()
            for part in (runs / "good" / "steps").iterdir():
                part.unlink()
            (runs / "good" / "steps").rmdir()

        monkeypatch.setattr("gradwatch.cli.tail.time.sleep", delete)
        ran = command("tail", "good")
        assert ran.code == 2
        assert ran.err.count("\n") == 1

    @pytest.mark.parametrize(("folder", "more"), [("empty", ()), ("nowhere", ("--wait",))])
    def test_waits_for_a_run_to_begin(self, command, tmp_path, monkeypatch, folder, more):
        """An empty folder is waited for, and with --wait one that is not there."""
        (tmp_path / "empty").mkdir()
        looks = []

        def sleep(_):
            looks.append(1)
            if len(looks) == 2:
                write(tmp_path / folder, batch([1, 2, 3]))
            if len(looks) == 4:
                raise KeyboardInterrupt

        monkeypatch.setattr("gradwatch.cli.tail.time.sleep", sleep)
        ran = command("tail", tmp_path / folder, *more, "--json")
        assert ran.code == 0
        assert _steps(ran) == [1, 2, 3]

    def test_ctrl_c_ends_it_with_0(self, command, runs, monkeypatch):
        """Ctrl-C is how tail ends, so that is fine."""

        def interrupt(_):
            raise KeyboardInterrupt

        monkeypatch.setattr("gradwatch.cli.tail.time.sleep", interrupt)
        assert command("tail", "good", "-n", "2").code == 0


class TestScreen:
    def test_shows_steps_curve_clip_and_events(self, runs):
        """The screen has the newest steps, the curve of the norm, the clip rate and the events."""
        shown = _screen("sick")
        assert "sick  step 120" in shown
        assert "threshold 2" in shown
        assert "clipped " in shown
        assert "Events: nan 1, skipped 1" in shown
        assert any(block in shown for block in "▁▂▃▄▅▆▇█")

    def test_hostile_names_are_text(self, runs):
        """Markup and control characters in names are shown, and move nothing."""
        shown = _screen("hostile", plain_only=True)
        assert shown.replace("\n", "").isprintable()


def _screen(run, plain_only=False):
    from rich.console import Console

    from gradwatch.cli.screen import Screen

    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    screen = Screen(Output(stream), run, 10)
    console = Console(file=io.StringIO(), width=100, height=40, no_color=plain_only)
    follower = Follower(__import__("pathlib").Path(run))
    follower.look()
    for part in screen._parts(follower):
        console.print(part)
    return console.file.getvalue()


def test_plain_says_once_that_it_waits():
    """A log is not filled with waiting."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    view = Lines(Output(stream), "runs/\x1b宽", 10, json=False)
    view.waiting()
    view.waiting()
    assert stream.buffer.getvalue() == b"Waiting for runs/\\x1b\\u5bbd to begin ...\n"

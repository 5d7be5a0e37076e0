"""A resumed run is one run: no step twice, none missing, and the newest process is right."""

import json

import pandas as pd
import pytest

from gradwatch.errors import GradwatchWarning
from gradwatch.history import load
from gradwatch.record.folder.writer import RunFolder

from . import runs


def _losses(path):
    return load(path).steps()["loss"].tolist()


def test_steps_after_the_checkpoint_are_replaced(tmp_path):
    """What the killed process did after its checkpoint gives way to what the resumed one did."""
    runs.write(tmp_path, runs.batch(range(1, 11), loss=1.0, events=[runs.event(7)]), close=False)
    runs.write(tmp_path, runs.batch(range(6, 9), loss=2.0, events=[runs.event(8)]))
    assert runs.steps_of(tmp_path) == list(range(1, 9))
    assert _losses(tmp_path) == [1.0] * 5 + [2.0] * 3
    assert load(tmp_path).events()["step"].tolist() == [8]
    assert len(load(tmp_path).parameters()) == 8 * 3


def test_other_tools_see_the_resumed_run_too(tmp_path):
    """The files themselves hold no void row after the resumed process's first delivery."""
    runs.write(tmp_path, *(runs.batch([step], loss=1.0) for step in range(1, 11)), close=False)
    runs.write(tmp_path, runs.batch([6, 7], loss=2.0), close=False)
    assert pd.read_parquet(tmp_path / "steps")["step"].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert len(pd.read_parquet(tmp_path / "parameters")) == 7 * 3


def test_the_rule_holds_before_the_files_are_cut(tmp_path, monkeypatch):
    """Killed between its first part and the cutting, a resumed process has resumed all the same."""
    runs.write(tmp_path, runs.batch(range(1, 11), loss=1.0, events=[runs.event(9)]), close=False)
    with monkeypatch.context() as patch:
        patch.setattr("gradwatch.record.folder.writer.Session.tidy", lambda self, batch: None)
        runs.write(tmp_path, runs.batch([6, 7], loss=2.0), close=False)
    assert len(pd.read_parquet(tmp_path / "steps")) == 12
    assert _losses(tmp_path) == [1.0] * 5 + [2.0] * 2
    assert len(load(tmp_path).events()) == 0
    assert load(tmp_path).parameters("b")["step"].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert len(load(tmp_path)) == 7


def test_each_optimizer_is_resumed_on_its_own(tmp_path):
    """A step of one optimizer replaces nothing of another, in whatever order they come."""
    runs.write(
        tmp_path,
        runs.batch(range(1, 11), optimizer="G", events=[runs.event(9, "G"), runs.event(9, "none")]),
        runs.batch(range(1, 21), optimizer="D", events=[runs.event(15, "D"), runs.event(19, "D")]),
        close=False,
    )
    second = runs.write(tmp_path, runs.batch([6], optimizer="G"), close=False)
    steps = load(tmp_path).steps()
    assert steps.index[steps["optimizer"] == "G"].tolist() == [1, 2, 3, 4, 5, 6]
    assert steps.index[steps["optimizer"] == "D"].tolist() == list(range(1, 21))
    assert load(tmp_path).events()["step"].tolist() == [15, 19]
    second.write(runs.batch([17], optimizer="D"))
    steps = load(tmp_path).steps()
    assert steps.index[steps["optimizer"] == "D"].tolist() == list(range(1, 18))
    assert load(tmp_path).events()["step"].tolist() == [15]


def test_resumed_many_times(tmp_path):
    """Every process that was killed leaves what it did up to the next one's first step."""
    first = 1
    for process in range(12):
        parts = (runs.batch([first + k], loss=float(process)) for k in range(5))
        runs.write(tmp_path, *parts, close=process % 2 == 0)
        first += 3
    assert runs.steps_of(tmp_path) == list(range(1, 39))
    assert _losses(tmp_path)[:6] == [0, 0, 0, 1, 1, 1]
    assert runs.assert_consistent(tmp_path) == 38


def test_a_later_process_can_begin_before_an_earlier_one(tmp_path):
    """Resumed from an older checkpoint, the run is what the newest process did from there."""
    for first, loss in ((1, 1.0), (8, 2.0), (4, 3.0)):
        runs.write(tmp_path, runs.batch(range(first, first + 6), loss=loss), close=False)
    assert runs.steps_of(tmp_path) == list(range(1, 10))
    assert _losses(tmp_path) == [1.0] * 3 + [3.0] * 6


def test_a_process_that_never_stepped_changes_nothing(tmp_path):
    """A folder that was opened again and closed without a step is as it was."""
    runs.write(tmp_path, runs.batch([1, 2]))
    before = sorted(path.name for path in tmp_path.rglob("*"))
    RunFolder(tmp_path).close()
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_the_model_may_change(tmp_path):
    """Parameters that only an earlier process had stay readable, behind those of the newest."""
    runs.write(tmp_path, runs.batch([1, 2], runs.layout("a", "old")), close=False)
    runs.write(tmp_path, runs.batch([3], runs.layout("new", "a")))
    history = load(tmp_path)
    assert history.names == ("new", "a", "old")
    assert history.layout.shapes == ((2, 3),) * 3
    assert history.parameters("old")["step"].tolist() == [1, 2]
    assert history.parameters(start=3)["parameter"].tolist() == ["new", "a"]


def test_meta_tells_every_process(tmp_path):
    """meta.json has the versions, optimizers and options of each, as plain JSON."""
    first = RunFolder(
        tmp_path,
        optimizers=[{"class": "AdamW", "lr": 1e-3, "betas": (0.9, 0.99), "f": print}],
        options={"clip": float("inf"), "every": 1},
    )
    first.write(runs.batch([1]))
    first.close()
    runs.write(tmp_path, runs.batch([2]))
    meta = json.loads((tmp_path / "meta.json").read_text(encoding="utf-8"))
    assert (meta["format"], meta["version"]) == ("gradwatch run", 1)
    assert [session["session"] for session in meta["sessions"]] == [1, 2]
    assert meta["sessions"][0]["optimizers"][0]["betas"] == [0.9, 0.99]
    assert meta["sessions"][0]["options"] == {"clip": "inf", "every": 1}
    assert {"python", "torch", "gradwatch", "pyarrow"} == set(meta["sessions"][0]["versions"])
    assert meta["layout"]["names"] == ["a", "b", "c"]


@pytest.mark.parametrize("torn", [b'{"step": 3, "micro', b"\x00\x00\x00", b"\xff{}\n", b"[]\n5\n"])
def test_a_torn_line_is_no_event(tmp_path, torn):
    """A line that the kill cut in the middle is left out, and nothing is appended to it."""
    runs.write(tmp_path, runs.batch([1, 2], events=[runs.event(2)]), close=False)
    with (tmp_path / "events/0001.jsonl").open("ab") as file:
        file.write(torn)
    assert load(tmp_path).events()["step"].tolist() == [2]
    runs.write(tmp_path, runs.batch([3], events=[runs.event(3)]))
    assert load(tmp_path).events()["step"].tolist() == [2, 3]


def test_events_before_the_first_steps_tell_no_new_run_from_a_resumed_one(tmp_path):
    """The run that is there waits for the steps: it is set aside, or goes on."""
    early = runs.batch([], events=[runs.event(1)])
    runs.write(tmp_path, runs.batch(range(1, 4)))
    runs.write(tmp_path, early, runs.batch([4]))
    assert runs.steps_of(tmp_path) == [1, 2, 3, 4]
    with pytest.warns(GradwatchWarning, match="earlier-1"):
        runs.write(tmp_path, early, runs.batch([1, 2]))
    assert runs.steps_of(tmp_path) == [1, 2]
    assert runs.steps_of(tmp_path / "earlier-1") == [1, 2, 3, 4]
    assert len(load(tmp_path).events()) == 1


def test_events_without_any_step_are_written_at_the_end(tmp_path):
    """To the run that is there, as nothing has replaced it."""
    runs.write(tmp_path, runs.batch([1, 2]))
    runs.write(tmp_path, runs.batch([], events=[runs.event(1)]))
    assert runs.steps_of(tmp_path) == [1, 2]

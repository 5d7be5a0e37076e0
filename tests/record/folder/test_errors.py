"""What is no run folder gets one clear sentence: what was given, why it fails, what to pass."""

import contextlib
import json
import pickle
import re
import shutil

import numpy as np
import pytest

from gradwatch.history import load
from gradwatch.record.folder.writer import RunFolder

from . import runs


@pytest.fixture
def run(tmp_path):
    """A run folder with three steps."""
    runs.write(tmp_path / "run", runs.batch([1, 2, 3]))
    return tmp_path / "run"


def _edit(run, **changes):
    path = run / "meta.json"
    meta = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(meta), encoding="utf-8")


def _refused(path, text, error=ValueError):
    with pytest.raises(error, match=text) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert repr(str(path)) in str(caught.value)


def test_no_folder(tmp_path):
    """A path where nothing is says so."""
    _refused(tmp_path / "none", "There is no folder .*run_dir", FileNotFoundError)


def test_a_file(run):
    """A file inside a run points at the folder."""
    _refused(run / "meta.json", f"is a file.*{re.escape(str(run))}")


def test_a_foreign_folder(tmp_path):
    """An empty or foreign folder has no meta.json."""
    (tmp_path / "notes.txt").write_text("hello", encoding="utf-8")
    _refused(tmp_path, "is not a run folder: it has no meta.json. Pass the folder")


def test_the_folder_above(run):
    """The folder that holds runs names them."""
    _refused(run.parent, f"Did you mean {re.escape(repr(str(run)))}")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"format": "x"}', '{"format": "gradwatch run"}', "\xff"]
)
def test_a_foreign_meta(run, content):
    """A meta.json of something else, or a broken one, is told from ours."""
    (run / "meta.json").write_text(content, encoding="latin-1")
    _refused(run, "was not written by gradwatch")


@pytest.mark.parametrize("layout", [None, {}, {"names": ["a"]}, 5])
def test_a_meta_without_its_parts(run, layout):
    """A layout that is none is told too."""
    _edit(run, layout=layout)
    _refused(run, "was not written by gradwatch")


def test_a_newer_format(run):
    """A run of a later gradwatch asks for the upgrade, when read and when resumed."""
    _edit(run, version=2)
    _refused(run, "format 2, and this gradwatch reads formats up to 1. Upgrade: pip install")
    with pytest.raises(ValueError, match="format 2"):
        RunFolder(run)


@pytest.mark.parametrize("table", ["steps", "parameters", "events"])
def test_half_a_folder(run, table):
    """A table that was not copied is named, before and after the history is open."""
    history = load(run)
    shutil.rmtree(run / table)
    _refused(run, f"half a run folder.*no {table}/")
    with pytest.raises((ValueError, FileNotFoundError), match=f"no {table}/"):
        (history.events if table == "events" else history.parameters)()


def test_tables_without_meta(run):
    """Tables alone are half a run, and are not written to."""
    (run / "meta.json").unlink()
    _refused(run, "half a run folder: it has steps/, parameters/, events/, but no meta.json")
    with pytest.raises(ValueError, match=r"no meta\.json"):
        RunFolder(run)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"x" * 5000])
@pytest.mark.parametrize("table", ["steps", "parameters"])
def test_a_damaged_part(run, table, content):
    """A part that is no Parquet file is named."""
    (path,) = (run / table).iterdir()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path.name}.* is damaged"):
        load(run).parameters()


def test_a_part_that_is_cut_or_changed_inside(run):
    """Whatever byte is wrong, it is an error of ours or none at all."""
    (path,) = (run / "steps").iterdir()
    content = path.read_bytes()
    for place in range(0, len(content), 97):
        for changed in (content[:place], content[:place] + b"\xff\xff" + content[place + 2 :]):
            path.write_bytes(changed)
            with contextlib.suppress(ValueError):
                load(run).steps()


def test_opening_a_run_executes_nothing(run, tmp_path):
    """A pickle in the place of any file is data that is wrong, and is not run."""

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    for path in [path for path in run.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        path.write_bytes(pickle.dumps(Bomb()))
        try:
            history = load(run)
            history.events()
            history.parameters()
        except ValueError:
            pass
        path.write_bytes(content)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("path", "error", "text"),
    [(5, TypeError, "5 of type int"), (b"x", TypeError, "bytes"), ("", ValueError, "empty")],
)
def test_what_is_no_path(path, error, text):
    """RunFolder() takes a path, and says what it got."""
    with pytest.raises(error, match=text):
        RunFolder(path)


def test_a_run_folder_that_is_a_file(tmp_path):
    """RunFolder() on a file is an error before the first step."""
    (tmp_path / "x").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="is a file"):
        RunFolder(tmp_path / "x")


def test_other_files_in_the_folder_do_not_matter(tmp_path):
    """A folder with checkpoints and logs in it may be the run folder, and is left as it is."""
    (tmp_path / "model.pt").write_bytes(b"x")
    runs.write(tmp_path, runs.batch([1]))
    for name in ("steps/readme.txt", "events/notes.jsonl", "events/x.txt"):
        (tmp_path / name).write_text("hello", encoding="utf-8")
    assert runs.steps_of(tmp_path) == [1]
    assert len(load(tmp_path).events()) == 0
    runs.write(tmp_path, runs.batch([2]))
    assert (tmp_path / "model.pt").read_bytes() == b"x"


@pytest.mark.parametrize(
    ("query", "error", "text"),
    [
        (
            lambda h: h.steps(["norm"]),
            ValueError,
            "columns.* must be names among optimizer, .*, got 'norm'",
        ),
        (lambda h: h.steps("lr"), TypeError, r"sequence of names, got 'lr'\. Write \[\"lr\"\]\."),
        (lambda h: h.steps(5), TypeError, r"sequence of names, got 5\. Write \[\"grad_norm\"\]\."),
        (lambda h: h.steps(start="1"), TypeError, r"steps\(start=\) must be a step number or None"),
        (lambda h: h.steps(stop=True), TypeError, "got True"),
        (lambda h: h.parameters(columns=["max"]), ValueError, "grad_norm_clipped, got 'max'"),
        (lambda h: h.parameters("aa"), ValueError, "not a parameter of this run. Did you mean 'a'"),
        (lambda h: h.parameters(["a", "zzz"]), ValueError, "'zzz'.*history.names lists them"),
        (lambda h: h.parameters(5), TypeError, "names or a compiled pattern, got 5"),
    ],
)
def test_a_wrong_question(run, query, error, text):
    """Unknown columns, names and bounds get the same answer from a live and a loaded history."""
    for history in (load(run), runs.live(runs.batch([1, 2, 3]))):
        with pytest.raises(error, match=text):
            query(history)


def test_a_pattern_finds_names(run):
    """A compiled pattern is searched for; numpy's integers are step numbers too."""
    for history in (load(run), runs.live(runs.batch([1, 2, 3]))):
        chosen = history.parameters(re.compile("^[ab]"), start=np.int64(2), stop=3)
        assert chosen["parameter"].tolist() == ["a", "b"]
        assert len(history.parameters(re.compile("x"))) == 0


WITHOUT = """
import sys
sys.modules["pyarrow"] = None
import gradwatch
from gradwatch.history import load
from gradwatch.record.folder.writer import RunFolder
for act in (lambda: RunFolder("x"), lambda: load("x")):
    try:
        act()
    except ModuleNotFoundError as error:
        print(error.name, error)
"""


def test_a_missing_pyarrow(tmp_path):
    """Both ends say how to install it, before anything else."""
    process = runs.child(WITHOUT, cwd=tmp_path)
    output, error = process.communicate(timeout=600)
    assert output.splitlines() == [
        "pyarrow RunFolder() needs pyarrow, which is not installed. Run: pip install 'gradwatch[runs]'",
        "pyarrow gradwatch.load() needs pyarrow, which is not installed. Run: pip install 'gradwatch[runs]'",
    ], error
    assert list(tmp_path.iterdir()) == []


def test_importing_gradwatch_loads_neither_pyarrow_nor_pandas():
    """They cost a second, which who keeps no run need not pay."""
    code = "import gradwatch, sys; print([m for m in ('pyarrow', 'pandas') if m in sys.modules])"
    output, _ = runs.child(code).communicate(timeout=600)
    assert output.strip() == "[]"

"""`gradwatch export`."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gradwatch.cli import export
from gradwatch.history import load

from .runs import HOSTILE, batch, write

TABLES = ("steps", "parameters", "events")
TEXT = dict.fromkeys(("optimizer", "outcome", "kind", "parameter", "module", "message"), str)
READ = {
    "csv": lambda path: pd.read_csv(path, keep_default_na=False, na_values=[""], dtype=TEXT),
    "json": pd.read_json,
    "parquet": pd.read_parquet,
}


def _table(run, name):
    frame = getattr(load(run), name)()
    return frame.reset_index() if name == "steps" else frame


@pytest.mark.parametrize("run", ["good", "sick", "hostile"])
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("form", READ)
def test_the_file_is_the_table(command, runs, run, table, form):
    """Read back, a file has the columns, rows and numbers of the History."""
    ran = command("export", run, "-o", f"x.{form}", "--table", table)
    expected = _table(run, table)
    assert ran == (0, f"Wrote x.{form} ({_rows(len(expected))} of {table} as {form})\n", "")
    if len(expected) or form != "json":
        read = READ[form](f"x.{form}")
        assert list(read.columns) == list(expected.columns)
        for column in expected.columns:
            _assert_equal(read[column], expected[column])


def _rows(amount):
    return f"{amount:,} row" + ("" if amount == 1 else "s")


def _assert_equal(read, expected):
    if expected.dtype.kind in "fi":
        got = read.to_numpy(expected.dtype, na_value=np.nan)
        np.testing.assert_allclose(got, expected.to_numpy(), rtol=1e-9)
    else:
        assert read.astype(object).fillna("").tolist() == expected.tolist()


@pytest.mark.parametrize("form", ["csv", "json"])
def test_without_a_file_it_goes_to_stdout(command, runs, form):
    """Without -o the same text is printed."""
    command("export", "sick", "--format", form, "-o", "x")
    assert command("export", "sick", "--format", form).out == (runs / "x").read_text(
        encoding="utf-8"
    )


def test_csv_is_the_default(command, runs):
    """Without a suffix and a format it is CSV."""
    assert command("export", "good").out.startswith("step,optimizer,time_s,")


def test_the_format_overrules_the_suffix(command, runs):
    """--format json writes JSON into any file."""
    command("export", "good", "--format", "json", "-o", "x.csv")
    assert len(json.loads((runs / "x.csv").read_text(encoding="utf-8"))) == 100


def test_numbers_in_json_that_are_not_finite(command, tmp_path):
    """NaN is null, and Inf is a string that pandas and JavaScript read as a number."""
    write(tmp_path / "run", batch([1], norm=float("inf")))
    (row,) = json.loads(command("export", tmp_path / "run", "--format", "json").out)
    assert row["grad_norm"] == "Infinity"
    assert row["loss"] is None


def test_a_long_run_is_written_in_pieces(command, runs, monkeypatch):
    """The pieces together are the table, without gap or repetition."""
    monkeypatch.setattr(export, "ROWS", 50)
    for form, reader in READ.items():
        command("export", "sick", "-o", f"x.{form}", "--table", "parameters")
        read = reader(f"x.{form}")
        expected = _table("sick", "parameters")
        assert read["step"].tolist() == expected["step"].tolist()
        assert read["parameter"].tolist() == expected["parameter"].tolist()


def test_names_keep_every_character_in_a_file(command, runs):
    """A file has the names as they are; only a screen gets them escaped."""
    command("export", "hostile", "-o", "x.csv", "--table", "parameters")
    assert set(READ["csv"]("x.csv")["parameter"]) == set(HOSTILE)


def test_json_tells_what_was_written(command, runs):
    """--json prints the file, its format and its rows."""
    ran = command("export", "good", "-o", "x.parquet", "--json")
    assert json.loads(ran.out) == {
        "run": "good",
        "table": "steps",
        "format": "parquet",
        "file": "x.parquet",
        "rows": 100,
    }


@pytest.mark.parametrize("target", ["good/meta.json", "good/steps/x.csv", "good/../good/events/x"])
def test_never_over_the_run_itself(command, runs, target):
    """A file of the run is not written over."""
    before = load("good").steps()
    ran = command("export", "good", "--format", "csv", "-o", target)
    assert ran.code == 2
    assert "is a file of the run itself" in ran.err
    pd.testing.assert_frame_equal(load("good").steps(), before)


@pytest.mark.parametrize("target", ["good", ".", "nowhere/x.csv", ""])
def test_a_target_that_is_no_file(command, runs, target):
    """A folder, or a file in no folder, is refused."""
    ran = command("export", "good", "--format", "csv", "-o", target)
    assert ran.code == 2
    assert ran.err.count("\n") == 1


def test_a_failure_leaves_the_old_file(command, runs, monkeypatch):
    """A file is replaced when the new one is whole, and not before."""
    (runs / "x.csv").write_text("old", encoding="utf-8")
    (part,) = (runs / "sick" / "parameters").iterdir()
    part.write_bytes(b"garbage")
    assert command("export", "sick", "-o", "x.csv", "--table", "parameters").code == 2
    assert (runs / "x.csv").read_text(encoding="utf-8") == "old"
    assert not [path for path in runs.iterdir() if path.name.startswith(".")]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a full disk to try")
def test_a_full_disk_is_one_line(command, runs):
    """A disk that is full is told of in one line."""
    ran = command("export", "good", "--format", "csv", "-o", "/dev/full")
    assert ran.code == 2
    assert ran.err == "gradwatch export: No space left on device\n"

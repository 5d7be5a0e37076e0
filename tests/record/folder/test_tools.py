"""pandas, DuckDB and Polars read the tables as they are."""

import math

import pandas as pd
import pytest

from . import runs


@pytest.fixture
def run(tmp_path):
    """A run of several parts, whose last event has an infinite value."""
    events = [runs.event(1), runs.event(2, value=math.inf)]
    runs.write(tmp_path, *(runs.batch([step]) for step in range(1, 5)), close=False)
    runs.write(tmp_path, runs.batch([5], events=events), close=False)
    return tmp_path


def test_pandas_reads_folders_and_files(run):
    """A folder and a single part are data frames."""
    assert pd.read_parquet(run / "steps")["step"].tolist() == [1, 2, 3, 4, 5]
    table = pd.read_parquet(str(run / "parameters"))
    assert list(table) == [
        "row", "step", "optimizer", "parameter", "grad_norm", "grad_norm_clipped",
    ]  # fmt: skip
    assert table.loc[table["parameter"] == "c", "grad_norm"].tolist() == [
        2001,
        2002,
        2003,
        2004,
        2005,
    ]
    part = max((run / "steps").iterdir())
    assert pd.read_parquet(part)["optimizer"].tolist() == ["SGD"]


def test_pandas_reads_events(run):
    """A line is a JSON object that is valid also where a value is infinite."""
    events = pd.read_json(run / "events/0002.jsonl", lines=True)
    assert events["step"].tolist() == [1, 2]
    assert float(events["value_is"].tolist()[1]) == math.inf


def test_duckdb_reads_all(run):
    """SQL over the files, the parameters by name and the clip joined to them."""
    duckdb = pytest.importorskip(
        "duckdb", reason="SQL on a run folder is not checked: pip install duckdb"
    )
    (steps,) = duckdb.sql(f"select count(*), max(step) from '{run}/steps/*.parquet'").fetchall()
    assert steps == (5, 5)
    curve = duckdb.sql(
        f"""select p.step, coalesce(p.grad_norm_clipped, s.clip_coef * p.grad_norm)
        from '{run}/parameters/*.parquet' p join '{run}/steps/*.parquet' s using (step, optimizer)
        where parameter = 'b' order by step"""
    ).fetchall()
    assert curve == [(step, 1000.0 + step) for step in range(1, 6)]
    events = duckdb.sql(f"select step, kind from '{run}/events/*.jsonl' order by step").fetchall()
    assert events == [(1, "nan"), (2, "nan")]


def test_polars_reads_all(run):
    """A lazy scan over the folder, with the filter pushed down."""
    polars = pytest.importorskip(
        "polars", reason="Polars on a run folder is not checked: pip install polars"
    )
    assert polars.read_parquet(run / "steps/*.parquet")["step"].to_list() == [1, 2, 3, 4, 5]
    assert len(polars.read_parquet(run / "steps")) == 5
    curve = polars.scan_parquet(run / "parameters/*.parquet").filter(polars.col("parameter") == "b")
    assert curve.collect()["grad_norm"].to_list() == [1001, 1002, 1003, 1004, 1005]
    assert polars.read_ndjson(run / "events/0002.jsonl")["step"].to_list() == [1, 2]


def test_rows_that_are_there_twice_can_be_dropped(tmp_path, monkeypatch):
    """In the middle of a merge a tool sees rows twice, as the docs say, and load() sees them once."""
    sink = runs.write(tmp_path, *(runs.batch([step]) for step in range(1, 5)), close=False)
    monkeypatch.setattr("gradwatch.record.folder.parts.PartStore._remove", lambda self, parts: None)
    sink.close()
    steps = pd.read_parquet(tmp_path / "steps")
    assert sorted(steps["step"]) == [1, 1, 2, 2, 3, 3, 4, 4]
    assert sorted(steps.drop_duplicates(["optimizer", "step"])["step"]) == [1, 2, 3, 4]
    keys = ["optimizer", "step", "parameter"]
    assert len(pd.read_parquet(tmp_path / "parameters").drop_duplicates(keys)) == 12
    assert runs.assert_consistent(tmp_path) == 4

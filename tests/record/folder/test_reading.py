"""Reading parts: their order, and columns that the gradwatch of their time did not write."""

import dataclasses

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.history import load
from gradwatch.record.columns import STEP_DTYPES, Span, python_rows
from gradwatch.record.folder import reader
from gradwatch.record.folder.files import UnreadableError
from gradwatch.record.folder.reader import FolderSource, _order

from . import runs

CELLS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 6)), max_size=80)


@given(CELLS, st.booleans())
def test_rows_are_ordered_by_step_and_parameter(cells, distinct):
    """As sorting would, whether the matrix is full, nearly empty, or has a cell twice."""
    cells = list(dict.fromkeys(cells)) if distinct else cells
    places, indices = (np.array([cell[axis] for cell in cells], np.int64) for axis in (0, 1))
    assert _order(places, indices).tolist() == np.lexsort((indices, places)).tolist()


def _without(folder, name):
    for path in (folder / "steps").iterdir():
        pq.write_table(pq.ParquetFile(path).read().drop_columns([name]), path)


@pytest.mark.parametrize("name", ["noise_scale", "loss", "grad_norm_local"])
def test_a_number_that_was_not_written_is_not_known(tmp_path, name):
    """A run of an older gradwatch is read, and one that a newer one resumes; the number is NaN."""
    runs.write(tmp_path, runs.batch([1, 2], **{name: 3.0}), close=False)
    _without(tmp_path, name)
    assert load(tmp_path).steps()[name].isna().all()
    runs.write(tmp_path, runs.batch([3], **{name: 4.0}))
    frame = load(tmp_path).steps()
    expected = pd.Series([np.nan, np.nan, 4.0], frame.index, name=name)
    pd.testing.assert_series_equal(frame[name], expected)
    assert runs.assert_consistent(tmp_path) == 3


@pytest.mark.parametrize("name", ["step", "outcome", "micro_batches", "row"])
def test_what_every_run_has_is_missed(tmp_path, name):
    """Without a column that is always there, the file is damaged."""
    runs.write(tmp_path, runs.batch([1, 2]))
    _without(tmp_path, name)
    with pytest.raises(UnreadableError, match=rf"is damaged: it has no column '{name}'\."):
        load(tmp_path).parameters() if name == "row" else load(tmp_path).steps()


@pytest.mark.parametrize(
    ("default", "kind"), [(7, "int"), (True, "bool"), ("a text", "str"), (1.5, "float")]
)
def test_a_column_that_is_new_today(tmp_path, monkeypatch, default, kind):
    """A run from before a column was declared has its default; a number that may be NaN is NaN."""
    runs.write(tmp_path, runs.batch([1, 2]))
    fields = [("step", int), ("new", kind, dataclasses.field(default=default))]
    record = dataclasses.make_dataclass("StepRecord", fields)
    dtype = {"int": np.int64, "bool": np.bool_, "float": np.float64}.get(kind)
    monkeypatch.setitem(STEP_DTYPES, "new", dtype)
    monkeypatch.setattr(reader, "StepRecord", record)
    if dtype is None:
        monkeypatch.setattr(reader, "STEP_LABELS", (*reader.STEP_LABELS, "new"))
    column = FolderSource(tmp_path).steps(("new",), Span())["new"]
    values = [value for (value,) in python_rows({"new": column})]
    expected = [np.nan] * 2 if kind == "float" else [default] * 2
    np.testing.assert_array_equal(values, expected)
